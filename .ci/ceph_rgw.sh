#!/bin/bash
# A durable S3 server of one node for the tests: Ceph's RADOS gateway on one disk in a file.
#
#   ceph_rgw.sh start DIR PORT   create it in DIR at the first call, start it again at later calls
#   ceph_rgw.sh stop DIR         kill -9 its daemons; acknowledged writes survive until the next `start`
#   ceph_rgw.sh restart DIR PORT stop and start
#
# `start` prints the settings of the tests: eval "$(.ci/ceph_rgw.sh start DIR PORT)".
# It listens on 127.0.0.1: on PORT, PORT + 1 (monitor) and ports from 6800 (disk). The file system of
# DIR must support O_DIRECT, as ext4 does. S3_ACCESS_KEY and S3_SECRET_KEY set the keys at creation.
set -euo pipefail

fail() {
  echo "ceph_rgw.sh: $*" >&2
  exit 1
}

usage() { fail "usage: ceph_rgw.sh start|restart DIR PORT, or stop DIR"; }

port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Whether the daemon that was started in DIR is running; a reused process id does not count.
runs() {
  local pid
  pid=$(cat "$DIR/run/$1.own" 2>/dev/null) || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$(cat "$DIR/run/$1.tag")"
}

# launch NAME COMMAND...: start it in its own session, so that it survives the terminal.
launch() {
  local name=$1
  shift
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 &
  echo $! >"$DIR/run/$name.own"
  echo "$*" >"$DIR/run/$name.tag"
}

# wait_for NAME SECONDS TEST...: wait until TEST succeeds; print the log and fail if the daemon exits.
wait_for() {
  local name=$1 seconds=$2
  shift 2
  for _ in $(seq $((seconds * 10))); do
    "$@" && return 0
    runs "$name" || break
    sleep 0.1
  done
  tail -n 20 "$DIR/log/$name.out" "$DIR/log/"*"$name"*.log 2>/dev/null >&2 || true
  kill_all
  fail "$name was not ready within $seconds s; its logs are in $DIR/log"
}

kill_all() {
  local name
  for name in rgw osd mon; do
    if runs "$name"; then kill -9 "$(cat "$DIR/run/$name.own")" 2>/dev/null || true; fi
  done
  for name in rgw osd mon; do
    for _ in $(seq 100); do
      runs "$name" || break
      sleep 0.1
    done
    if runs "$name"; then fail "$name (process $(cat "$DIR/run/$name.own")) cannot be killed"; fi
    rm -f "$DIR/run/$name.own" "$DIR/run/$name.tag"
  done
}

disk_active() {
  ceph --admin-daemon "$DIR/run/osd.0.$(cat "$DIR/run/osd.own").asok" status 2>/dev/null |
    grep -q '"active"'
}

write_config() {
  cat >"$CEPH_CONF" <<EOF
[global]
fsid = $1
mon_host = v2:127.0.0.1:$MON_PORT
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = $DIR/run
pid_file = $DIR/run/\$name.pid
admin_socket = $DIR/run/\$name.\$pid.asok
log_file = $DIR/log/\$name.log
crash_dir = $DIR/log
mon_data = $DIR/mon
osd_data = $DIR/osd
rgw_data = $DIR/rgw
osd_objectstore = bluestore
bluestore_block_size = 10737418240
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
rgw_rados_pool_pg_num_min = 8
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 1
mon_data_avail_warn = 2
mon_client_hunt_interval = 0.5
osd_mon_shutdown_timeout = 1
# Without these two settings, the first start takes 18 s instead of 5 s.
paxos_propose_interval = 0.05
paxos_min_wait = 0.01

[client.rgw]
auth_client_required = none
# Without this setting, the gateway does not start if authentication is off.
ms_mon_client_mode = crc
# Without tcp_nodelay, small reads drop from 750 to 23 per second.
rgw_frontends = beast endpoint=127.0.0.1:$PORT tcp_nodelay=1
rgw_thread_pool_size = 64
# Free deleted data after one minute instead of two hours.
rgw_gc_obj_min_wait = 60
rgw_gc_processor_period = 60
EOF
}

create_monitor() {
  write_config "$1"
  monmaptool --create --fsid "$1" --addv a "[v2:127.0.0.1:$MON_PORT]" "$DIR/monmap" >/dev/null
  ceph-mon --mkfs -i a --monmap "$DIR/monmap"
}

create_disk() {
  local uuid
  uuid=$(cat /proc/sys/kernel/random/uuid)
  timeout 60 ceph osd new "$uuid" >/dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$uuid" >>"$DIR/log/osd.out" 2>&1
}

start() {
  local tool
  for tool in ceph ceph-mon ceph-osd radosgw radosgw-admin monmaptool setsid; do
    command -v "$tool" >/dev/null || fail "$tool is missing; run .ci/install_ceph.sh as root"
  done
  mkdir -p "$DIR"/{mon,osd,rgw,run,log}
  if [ -e "$DIR/created" ]; then
    # The address of a monitor cannot change.
    [ "$(cat "$DIR/created")" = "$PORT" ] || fail "$DIR was created for port $(cat "$DIR/created")"
  elif [ -e "$CEPH_CONF" ]; then
    fail "an earlier start failed; stop it, remove $DIR and start again"
  fi
  if runs mon && runs osd && runs rgw && port_open "$PORT"; then
    return 0
  fi
  kill_all
  port_open "$PORT" && fail "port $PORT is in use"
  port_open "$MON_PORT" && fail "port $MON_PORT is in use"

  [ -e "$DIR/created" ] || create_monitor "$(cat /proc/sys/kernel/random/uuid)"
  launch mon ceph-mon -f -c "$CEPH_CONF" -i a
  wait_for mon 20 port_open "$MON_PORT"
  [ -e "$DIR/created" ] || create_disk
  launch osd ceph-osd -f -c "$CEPH_CONF" -i 0
  # A gateway that starts before the disk is active needs twice the time.
  wait_for osd 40 disk_active
  launch rgw radosgw -f -c "$CEPH_CONF" -n client.rgw
  if [ ! -e "$DIR/created" ]; then
    timeout 120 radosgw-admin -n client.rgw user create --uid=test --display-name=test \
      --access-key="${S3_ACCESS_KEY:-testkey}" --secret-key="${S3_SECRET_KEY:-testsecret}" \
      >"$DIR/log/user.out" 2>&1 || fail "cannot create the user; see $DIR/log/user.out"
    (umask 077 && printf '%s\n%s\n' "${S3_ACCESS_KEY:-testkey}" "${S3_SECRET_KEY:-testsecret}" \
      >"$DIR/keys")
  fi
  wait_for rgw 60 port_open "$PORT"
  echo "$PORT" >"$DIR/created"
}

print_settings() {
  {
    read -r access
    read -r secret
  } <"$DIR/keys"
  cat <<EOF
export LORASEG_TEST_S3_ENDPOINT=http://127.0.0.1:$PORT
export LORASEG_TEST_S3_ACCESS_KEY=$access
export LORASEG_TEST_S3_SECRET_KEY=$secret
export LORASEG_TEST_S3_RESTART='bash "$SELF" restart "$DIR" $PORT'
EOF
}

[ $# -ge 2 ] || usage
DIR=$(realpath -m "$2")
export CEPH_CONF=$DIR/ceph.conf
SELF=$(realpath "$0")
case $1 in
  start | restart)
    [ $# -eq 3 ] && [[ $3 =~ ^[0-9]+$ ]] || usage
    PORT=$3
    MON_PORT=$((PORT + 1))
    if [ "$1" = restart ]; then kill_all; fi
    start
    print_settings
    ;;
  stop)
    [ $# -eq 2 ] || usage
    [ -d "$DIR/run" ] || fail "there is no server in $DIR"
    kill_all
    ;;
  *) usage ;;
esac
