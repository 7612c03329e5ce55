#!/bin/sh
# What the tests need beyond Python, installed once and only when missing: a headless Chromium (the site), Java 17 or
# newer (Spark), and PostgreSQL's programs (the tests start a server of their own; none is started for the system).
set -eu

have_one_of() {
    for name in "$@"; do command -v "$name" >/dev/null 2>&1 && return 0; done
    return 1
}

have_java() {
    have_one_of java || return 1
    major=$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1)
    [ "${major:-0}" -ge 17 ]
}

have_postgres() {
    have_one_of initdb && return 0
    for program in /usr/lib/postgresql/*/bin/initdb /opt/homebrew/opt/postgresql*/bin/initdb /usr/pgsql-*/bin/initdb; do
        [ -x "$program" ] && return 0
    done
    return 1
}

missing=""
have_one_of chromium chromium-browser google-chrome || missing="$missing chromium"
have_java || missing="$missing java"
have_postgres || missing="$missing postgresql"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "The tests also need:$missing (Java 17 or newer). Install them with your package manager, then run make test again." >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then sudo=""; else sudo="sudo"; fi
$sudo apt-get update -qq

packages=""
for part in $missing; do
    if [ "$part" = java ]; then # the first of these that this release has
        for part in openjdk-17-jre-headless openjdk-21-jre-headless openjdk-25-jre-headless default-jre-headless; do
            [ -n "$(apt-cache madison "$part" 2>/dev/null)" ] && break
        done
    fi
    packages="$packages $part"
done

# Debian creates a cluster and starts it when PostgreSQL is installed, unless this file says no at that moment.
switch=/etc/postgresql-common/createcluster.d/bigmodel_nb.conf
case "$packages" in *postgresql*)
    $sudo mkdir -p "${switch%/*}"
    echo "create_main_cluster = false" | $sudo tee "$switch" >/dev/null
esac
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
case "$packages" in *postgresql*) $sudo rm -f "$switch"; esac
