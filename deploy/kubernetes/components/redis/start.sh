#!/bin/sh
# Starts Redis on a configuration, with the password of a file.
# Usage: start.sh CONFIG, with REDIS_PASSWORD_FILE set, in the folder of the data.
set -eu
# On no command line, where every user of the machine could read it.
password=$(cat "$REDIS_PASSWORD_FILE")
[ -n "$password" ] || { echo "$REDIS_PASSWORD_FILE is empty" >&2; exit 1; }

# A Redis that was killed in the middle of a transaction leaves a half of it at the end of its file, and what it
# writes after that can be lost at its next start: the half goes before anybody writes.
for file in appendonlydir/appendonly.aof.manifest appendonly.aof; do
    if [ -s "$file" ]; then
        echo y | redis-check-aof --fix "$file"
    fi
done

exec redis-server "$1" - <<EOF
requirepass $password
EOF
