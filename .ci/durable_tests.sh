#!/usr/bin/env bash
# Run the tests marked `durable`, or those that the arguments select, on a durable S3 server. Ceph RGW is
# installed and started unless LORASEG_TEST_S3_ENDPOINT names another server.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${LORASEG_TEST_S3_ENDPOINT:-}" ]; then
    bash .ci/install_ceph.sh
    dir=$(mktemp -d)
    port=${LORASEG_CEPH_PORT:-7480}
    trap 'bash .ci/ceph_rgw.sh stop "$dir"; rm -rf "$dir"' EXIT
    bash .ci/ceph_rgw.sh start "$dir" "$port"
    export LORASEG_TEST_S3_ENDPOINT="http://127.0.0.1:$port"
    export LORASEG_TEST_S3_ACCESS_KEY=testkey LORASEG_TEST_S3_SECRET_KEY=testsecret
    export LORASEG_TEST_S3_RESTART="bash $PWD/.ci/ceph_rgw.sh restart $dir $port"
fi
[ $# -gt 0 ] || set -- -m durable tests/integration
.venv/bin/python -m pytest -rs "$@"
