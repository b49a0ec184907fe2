#!/usr/bin/env bash
# Install Chromium for the tests of the page; without root or apt nothing is installed, and these
# tests are skipped.
set -euo pipefail
if command -v chromium > /dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
