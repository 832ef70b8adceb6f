#!/bin/sh
# Starts the whole service, traces one sentence through it, and stops it again.
# Usage: demo.sh OUT_DIR MODEL, with reltrace on the PATH.
set -eu
out=$1
model=$2
mkdir -p "$out"
rm -f "$out/ready"

reltrace up --model "$model" --port 0 --data "$out/data" >"$out/ready" &
service=$!
trap 'kill "$service" 2>/dev/null; wait "$service" 2>/dev/null || true' EXIT INT TERM

# The service prints its address once a job would be served, and gives up by itself.
while ! [ -s "$out/ready" ]; do
    kill -0 "$service" 2>/dev/null || { echo "reltrace up did not start" >&2; exit 1; }
    sleep 0.1
done
cat "$out/ready"
server=$(sed -E 's/.* at ([^ ]+).*/\1/' "$out/ready")

prompt="I have 5 cats and 3 dogs. My cats love to play with my"
reltrace trace "$prompt" --server "$server" --site resid --site embed --plot "$out/trace.png"
reltrace trace "$prompt" --server "$server" --plot "$out/trace.html" --json - >"$out/trace.json"
