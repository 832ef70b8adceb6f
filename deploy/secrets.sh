#!/bin/sh
# Makes the secrets that compose.yaml and the Kubernetes overlays read. What is there already stays.
# Usage: secrets.sh FOLDER NAME...   with the host names and IP addresses under which schedulers are reached
#
# Tokens are made by `reltrace-scheduler`, or by the command in RELTRACE_SCHEDULER, such as
# "docker run --rm reltrace-scheduler:0.1.0".
set -eu
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
folder=$1
shift
scheduler=${RELTRACE_SCHEDULER:-reltrace-scheduler}

# The folder keeps other users out. The files do not: in a container they belong to another user, who must read them.
umask 022
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

[ -s redis-password ] || openssl rand -hex 32 >redis-password
[ -s grafana-password ] || openssl rand -hex 16 >grafana-password
# For models behind a consent form, put a token of Hugging Face into it.
[ -e hub.token ] || : >hub.token
# For Kubernetes: where large results go.
[ -e results.env ] || cat >results.env <<EOF
# Bucket for results that are too large for Redis, such as s3://BUCKET/FOLDER, and the variables that open it. Clients
# need the same access.
RELTRACE_RESULTS_URL=
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=
#AWS_DEFAULT_REGION=
EOF

# token NAME ROLE [OPTION...]: the token into NAME.token, its hash into tokens.toml.
token() {
    if [ -s "$1.token" ]; then
        return
    fi
    name=$1 role=$2
    shift 2
    # Without --file the entry goes to standard error; so the command may run in a container that sees no file here.
    # shellcheck disable=SC2086 # The command is several words.
    if $scheduler token --name "$name" --role "$role" "$@" >"$name.part" 2>entry.part; then
        cat entry.part >>tokens.toml
        mv "$name.part" "$name.token"
        rm entry.part
    else
        cat entry.part >&2
        rm -f "$name.part" entry.part
        exit 1
    fi
}
token client client
token operator operator
token worker worker

if ! [ -s server.pem ]; then
    # localhost: health checks and forwarded ports.
    names=DNS:localhost,IP:127.0.0.1
    for name in "$@"; do
        case $name in
            *:*) names=$names,IP:$name ;;
            *[!0-9.]*) names=$names,DNS:$name ;;
            *) names=$names,IP:$name ;;
        esac
    done
    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=reltrace -addext "subjectAltName=$names" \
        -keyout server-key.pem -out server.pem 2>openssl.log || { cat openssl.log >&2; exit 1; }
    rm openssl.log
    # openssl makes keys for their owner only.
    chmod 644 server-key.pem
fi
echo "$folder: $(echo *)"
