#!/bin/bash
# Install the daemons that .ci/ceph_rgw.sh runs (Debian or Ubuntu, root). They are not started.
set -euo pipefail

needed() {
  local tool
  for tool in ceph ceph-mon ceph-osd radosgw radosgw-admin monmaptool; do
    command -v "$tool" >/dev/null || return 0
  done
  return 1
}

needed || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install_ceph.sh: needs root and apt-get; install ceph-mon, ceph-osd and radosgw" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The manager daemon is left out: a store of one disk that lives for minutes does without.
apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw >/dev/null
if needed; then
  echo "install_ceph.sh: the packages are installed but a daemon is still missing" >&2
  exit 1
fi
