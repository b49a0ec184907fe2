#!/bin/bash
# Install the daemons that .ci/ceph_rgw.sh starts (Debian or Ubuntu, as root).
set -euo pipefail

is_missing() {
  local tool
  for tool in ceph ceph-mon ceph-osd radosgw radosgw-admin monmaptool; do
    command -v "$tool" >/dev/null || return 0
  done
  return 1
}

is_missing || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install_ceph.sh: needs root and apt-get; install ceph-mon, ceph-osd and radosgw" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The manager daemon is not installed: a store of one disk that runs for minutes does not need it.
apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw >/dev/null
if is_missing; then
  echo "install_ceph.sh: the packages are installed but a daemon is still missing" >&2
  exit 1
fi
