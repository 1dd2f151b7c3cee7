#!/usr/bin/env bash
# Three parties on this machine, each in a network namespace of its own, with WireGuard between them: share a
# model with them, ask them something, and take everything down again.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/local_mesh.sh [options]

Prepares what is missing (virtual environment, C kernels, wireguard-go), raises three namespaces with a
WireGuard mesh and a `mimir-peer run` in each, shares a model with them as its owner, sends a prompt as a
client from a fourth namespace, prints the answer as it comes, and takes everything down: on success, on an
error and on Ctrl-C. Run again at once, it works again.

  --model DIR        a Hugging Face directory, Llama or GPT-2 family (default: the demo that comes along)
  --prompt TEXT      what to continue (default: "Once upon a time")
  --max-new N        tokens to print at most (default: 24)
  --chat             talk with the model instead, turn after turn
  --keep             stay up after the answer, say how to go on, end with Ctrl-C
  --json             events as JSON lines on standard output and nothing else there
  --wan RTT[:MBIT]   delay what passes between the parties by RTT milliseconds there and back, and limit it to
                     so many Mbit/s each way, such as 20:100; the way between client and parties stays short
  --rotate SECONDS   new tunnel keys so often, at least 5, or 0 for never (default: 10)
  --no-attest        let the parties believe each other by their keys alone, without software TPMs
  --no-tunnel        on loopback, without root and WITHOUT TRANSPORT PROTECTION: for trying out only
  --base-port N      ports N to N+99 are used (default: 7100)
  --workdir DIR      keep keys, configurations, shares and logs here, and use them again (default: a
                     temporary directory, removed at the end)
  --set KEY=VALUE    change the parties' configuration, such as scheduler.max_context=128; may be repeated
  --no-setup         do not look whether anything has to be prepared
  -v, --verbose      show every command that needs privilege before it runs, and the parties' logs at the end
  -h, --help         this text

Needs root for namespaces and tunnels. Every command that uses that is written to WORKDIR/commands.log before it
runs. Without root, or without /dev/net/tun and a kernel with WireGuard, --no-tunnel still works.

exit status: 0 done; 2 wrong arguments; 5 this host lacks something, and the message says what; 130 Ctrl-C;
otherwise that of the command that failed, as listed by `mimir --help`.
END
}

# --- arguments ---

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=$root/demo
prompt="Once upon a time"
max_new=24
chat='' keep='' json='' wan='' tunnel=1 base_port=7100 workdir='' verbose='' setup=1 attest=1 rotate=10
settings=()

say() { printf '%s\n' "$*" >&2; }
die() { # status, message
    say "local_mesh: ${*:2}"
    exit "$1"
}

while (($#)); do
    case $1 in
        --model | --prompt | --max-new | --wan | --base-port | --workdir | --set | --rotate)
            (($# > 1)) || die 2 "$1 needs a value; see --help"
            case $1 in
                --model) model=$2 ;;
                --prompt) prompt=$2 ;;
                --max-new) max_new=$2 ;;
                --wan) wan=$2 ;;
                --base-port) base_port=$2 ;;
                --workdir) workdir=$2 ;;
                --rotate) rotate=$2 ;;
                --set) settings+=(--set "$2") ;;
            esac
            shift
            ;;
        --chat) chat=1 ;;
        --keep) keep=1 ;;
        --json) json=1 ;;
        --no-tunnel) tunnel='' ;;
        --no-attest) attest='' ;;
        --no-setup) setup='' ;;
        -v | --verbose) verbose=1 ;;
        -h | --help) usage; exit 0 ;;
        *) die 2 "$1 is not understood; see --help" ;;
    esac
    shift
done
[[ $max_new =~ ^[1-9][0-9]{0,5}$ ]] || die 2 "--max-new $max_new: must be a number from 1"
[[ $base_port =~ ^[0-9]{1,5}$ ]] && ((base_port >= 1024 && base_port <= 65000)) ||
    die 2 "--base-port $base_port: must be from 1024 to 65000"
[[ -z $wan || -n $tunnel ]] || die 2 "--wan delays the tunnels, so it cannot go with --no-tunnel"
[[ -z $wan || $wan =~ ^[0-9]+(\.[0-9]+)?(:[0-9]+(\.[0-9]+)?)?$ ]] || die 2 "--wan $wan: must be RTT or RTT:MBIT"
[[ $rotate =~ ^(0|[5-9]|[1-9][0-9]{1,5})$ ]] || die 2 "--rotate $rotate: must be seconds from 5, or 0 for never"
[[ -n $tunnel ]] || attest='' # evidence vouches for the keys of tunnels
[[ -f $model/config.json ]] || die 4 "$model: no model there (config.json is missing); give --model DIR"

offer() {
    say "local_mesh: $1"
    say "To try the rest without it, on loopback and WITHOUT TRANSPORT PROTECTION:"
    say "  scripts/local_mesh.sh --no-tunnel"
    exit 5
}

if [[ -n $tunnel ]]; then
    ((EUID == 0)) || offer "network namespaces and tunnels need root; run this with sudo."
    command -v ip >/dev/null || offer "needs the program ip (Debian: iproute2)."
fi

# --- what is prepared once ---

export MIMIR_VENV=${MIMIR_VENV:-$root/.venv}
want=()
[[ -z $tunnel ]] || want+=(--tunnel)
[[ -z $attest ]] || want+=(--attester)
((EUID != 0)) || want+=(--packages)
[[ -z $verbose ]] || want+=(-v)
status=0
[[ -z $setup ]] || "$root/scripts/setup" "${want[@]}" || status=$?
if ((status)); then
    [[ -n $tunnel ]] && ((status == 5)) && offer "this host lacks something; see above."
    exit "$status"
fi
bin=$MIMIR_VENV/bin

# --- names, and what is left behind by a run that was killed ---

readonly PREFIX=mimir RECORDS=/run/mimir-mesh READY_SECONDS=90 STOP_SECONDS=20
id=$$
hub=$PREFIX-$id-net
client_space=$PREFIX-$id-c
temporary=''
pids=()      # what we started and have to end, in the order of starting
spaces=()    # namespaces we made
cleaning=''

note() {
    printf '+ %s\n' "$*" >>"$workdir/commands.log"
    [[ -z $verbose ]] || say "+ $*"
}
privileged() {
    note "$*"
    "$@"
}

started() { # when a process started, to tell it from a later one of the same number
    local fields
    fields=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    fields=${fields##*) }
    # shellcheck disable=SC2086
    set -- $fields
    printf '%s\n' "${20}"
}

drop_space() { # a namespace of ours: end what still runs in it, by pid, and delete it
    local pid
    for pid in $(ip netns pids "$1" 2>/dev/null); do privileged kill -KILL "$pid" 2>/dev/null || true; done
    privileged ip netns del "$1" 2>/dev/null || true
}

drop_sockets() { # of wireguard-go that had no time to remove them; the number is that of the run
    local socket
    for socket in /var/run/wireguard/mm"$1"-?{,[a-d]}.sock; do
        if [[ -S $socket ]]; then privileged rm -f -- "$socket"; fi
    done
}

sweep() { # namespaces with our prefix whose owner is dead
    local space owner record
    for space in $(ip netns list | awk '{ print $1 }' | grep -E "^$PREFIX-[0-9]+-(0|1|2|c|net)$" || true); do
        owner=${space#"$PREFIX"-}
        owner=${owner%%-*}
        record=$RECORDS/$owner
        if [[ -r $record ]] && [[ $(started "$owner" || true) == $(head -n 1 "$record") ]]; then continue; fi
        say "removing $space, left behind by a run that was killed"
        drop_space "$space"
        drop_sockets "$owner"
    done
    for record in "$RECORDS"/*; do
        [[ -r $record ]] || continue
        owner=${record##*/}
        [[ $(started "$owner" || true) == $(head -n 1 "$record") ]] && continue
        # Its temporary directory holds keys and shares: do not leave those lying about.
        space=$(sed -n 2p "$record")
        [[ $space == */mimir-mesh.?????????? && -d $space && -O $space ]] && rm -rf -- "$space"
        rm -f -- "$record"
    done
}

# --- the end, however it comes ---

await_end() { # wait for a process that has been asked to end, and insist in the end. Not asked twice: a party
    # that takes its tunnel down takes a second signal as an order to drop everything.
    local pid=$1 left=$((STOP_SECONDS * 20))
    while kill -0 "$pid" 2>/dev/null && ((left--)); do sleep 0.05; done
    kill -KILL "$pid" 2>/dev/null || true
}

clean() {
    local status=$? index
    [[ -z $cleaning ]] || return
    cleaning=1
    trap '' INT TERM HUP
    if ((status != 0 && status < 128)) || [[ -n $verbose ]]; then
        for index in 0 1 2; do
            [[ -s $workdir/party$index/log ]] || continue
            say "--- party $index, last lines of its log ---"
            tail -n 15 "$workdir/party$index/log" >&2
        done
    fi
    # All at once, then wait: each takes a moment to take its tunnel down.
    for index in "${!pids[@]}"; do kill -TERM "${pids[index]}" 2>/dev/null || true; done
    for index in "${!pids[@]}"; do await_end "${pids[index]}"; done
    wait 2>/dev/null || true
    for index in "${spaces[@]}"; do drop_space "$index"; done
    [[ -z $tunnel ]] || drop_sockets "$id"
    rm -f -- "$RECORDS/$id"
    if [[ -n $temporary ]]; then
        if ((status != 0 && status < 128)) && [[ -n $(find "$workdir"/party?/log -size +0 2>/dev/null) ]]; then
            # Logs help to find out why; keys and shares do not.
            rm -rf -- "$workdir"/party?/{data,tpm} "$workdir"/party?/*.key "$workdir"/*.key
            say "logs are kept in $workdir"
        else
            rm -rf -- "$workdir"
        fi
    fi
    exit "$status"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ -n $workdir ]]; then
    mkdir -p -m 0700 "$workdir"
    workdir=$(cd "$workdir" && pwd)
    exec 8>"$workdir/.lock"
    flock -n 8 || die 2 "$workdir is in use by another run"
else
    workdir=$(mktemp -d "${TMPDIR:-/tmp}/mimir-mesh.XXXXXXXXXX")
    temporary=1
fi
: >"$workdir/commands.log"

# Started in the background: away from the terminal's Ctrl-C, so that the order of ending is ours, and ended by the
# kernel if we are killed. $! is the pid of the program itself, as each of these becomes the next.
launch() { # log file, command. Not a function in the background: $! would then be a shell in between.
    local log=$1
    shift
    note "$*"
    setsid setpriv --pdeathsig TERM -- "$@" </dev/null >"$log" 2>&1 &
    pids+=($!)
}
inside() { # the words before a command that run it in a namespace; none without a tunnel
    [[ -z $tunnel ]] || printf '%s\n' ip netns exec "$1"
}

if [[ -n $tunnel ]]; then
    mkdir -p -m 0755 "$RECORDS"
    sweep
    { started $$; [[ -z $temporary ]] && echo || printf '%s\n' "$workdir"; } >"$RECORDS/$id"

    # --- namespaces: a bridge in the middle, with a cable to each party and to the client ---

    make_space() {
        privileged ip netns add "$1"
        spaces+=("$1")
        privileged ip -n "$1" link set lo up
    }
    plug() { # namespace, address
        local port=p${#spaces[@]}
        make_space "$1"
        privileged ip link add "$port" netns "$hub" type veth peer name eth0 netns "$1"
        privileged ip -n "$hub" link set "$port" master br0 up
        privileged ip -n "$1" addr add "$2/24" dev eth0
        privileged ip -n "$1" link set eth0 up
    }
    make_space "$hub"
    privileged ip -n "$hub" link add br0 type bridge
    privileged ip -n "$hub" addr add 10.90.0.254/24 dev br0
    privileged ip -n "$hub" link set br0 up
    for party in 0 1 2; do plug "$PREFIX-$id-$party" "10.90.0.$((party + 1))"; done
    plug "$client_space" 10.90.0.10
else
    say "!! NO TUNNEL: the parties talk over loopback WITHOUT TRANSPORT PROTECTION. Whoever can listen on this"
    say "!! machine sees enough to reconstruct prompt, weights and answer. For trying out only."
fi

# --- keys and configurations ---

make_key() { # kind, name
    local out=$workdir/$2
    [[ -f $out.key && (-s $out.pub || $1 == storage) ]] && return
    rm -f -- "$out.key"
    "$bin/mimir" keygen --kind "$1" --out "$out.key" >"$out.pub" 2>"$out.err" || {
        cat "$out.err" >&2
        return 1
    }
    rm -f -- "$out.err"
    [[ -s $out.pub ]] || rm -f -- "$out.pub" # a storage key has no public half
}
making=()
for party in 0 1 2; do
    mkdir -p -m 0700 "$workdir/party$party"
    make_key identity "party$party/identity" & making+=($!)
    [[ -n $attest ]] || { make_key tunnel "party$party/tunnel" & making+=($!); }
    make_key storage "party$party/storage" & making+=($!)
done
make_key identity owner & making+=($!)
make_key identity client & making+=($!)
for pid in "${making[@]}"; do wait "$pid"; done

if [[ -n $attest ]]; then
    # One software TPM for each party. It proves the protocol and nothing of the machine: whoever reads its directory
    # can sign whatever he likes, and everything that it signs is shown as SIMULATED.
    for party in 0 1 2; do
        mapfile -t where < <(inside "$PREFIX-$id-$party")
        launch "$workdir/party$party/tpm.log" "${where[@]}" "$root/scripts/software_tpm" "$workdir/party$party/tpm"
    done
fi

render=("$workdir" --base-port "$base_port" --interface "mm$id" --tokenizer "$model")
[[ -z $tunnel ]] || render+=(--set "tunnel.rotate_seconds=$rotate")
[[ -n $tunnel ]] || render+=(--no-tunnel)
[[ -z $attest ]] || render+=(--attested)
[[ -z $wan ]] || render+=(--relay 10.90.0.254)
# All three are here: close together, unless --wan says otherwise, and each gets a third of the processors. --set comes
# later and says otherwise.
apart=${wan%%[:.]*}
apart=$((10#${apart:-0}))
render+=(--set "scheduler.round_trip_ms=$((apart > 1000 ? 1000 : apart > 1 ? apart : 1))")
threads=$(($(nproc) / 3))
render+=(--set "kernels.threads=$((threads > 64 ? 64 : threads > 1 ? threads : 1))")
"$bin/python" "$root/scripts/render_configs.py" "${render[@]}" "${settings[@]}"

if [[ -n $attest ]]; then
    # The policy: exactly these three machines, with this code and these terms, signed by the model's owner.
    policy=$workdir/policy.toml
    rm -f -- "$policy" "$policy.sig"
    "$bin/mimir" policy new "$policy" --name mesh --environment simulation --days 30 2>>"$workdir/policy.log"
    sed -i "s/^version = 1 /version = $(date +%s) /" "$policy" # later than any that the parties have seen here
    making=()
    for party in 0 1 2; do
        for _ in {1..200}; do [[ -S $workdir/party$party/tpm/socket ]] && break || sleep 0.05; done
        "$bin/mimir" attester enroll --config "$workdir/party$party/party.toml" --id "party$party" \
            >"$workdir/party$party/entry.toml" 2>"$workdir/party$party/enroll.log" & making+=($!)
    done
    for party in 0 1 2; do
        wait "${making[party]}" || status=$?
        if ((status)); then # a setting that is not understood, or a TPM that is not there
            cat "$workdir/party$party/enroll.log" >&2
            [[ -S $workdir/party$party/tpm/socket ]] || cat "$workdir/party$party/tpm.log" >&2
            exit "$status"
        fi
        cat "$workdir/party$party/entry.toml" >>"$policy"
    done
    "$bin/mimir" policy sign "$policy" --key "$workdir/owner.key" 2>>"$workdir/policy.log"
fi

# --- the wide area ---

if [[ -n $wan ]]; then
    "$bin/python" -m wg.relay build "$workdir/relay"
    shape=$("$bin/python" -m wg.relay shape "$wan")
    relay=("$workdir/relay" --fifo --shape "$shape")
    for pair in "0 1" "0 2" "1 2"; do
        read -r a b <<<"$pair"
        to_b=$((base_port + 30 + 8 * (3 * a + b))) to_a=$((base_port + 30 + 8 * (3 * b + a)))
        relay+=(--pair "10.90.0.254:$to_b" "10.90.0.$((a + 1)):$((base_port + 20 + a))"
            "10.90.0.254:$to_a" "10.90.0.$((b + 1)):$((base_port + 20 + b))")
        # Further generations: b waits at one of two ports, whichever a calls from (see wg/rotation.py).
        for slot in 1 2; do
            offset=$((a == (b + 1) % 3 ? slot : slot + 2))
            relay+=(--pair "10.90.0.254:$((to_b + offset))" "10.90.0.$((a + 1)):0"
                "10.90.0.254:$((to_a + offset))" "10.90.0.$((b + 1)):$((base_port + 20 + b + offset))")
        done
    done
    launch "$workdir/relay.log" ip netns exec "$hub" "${relay[@]}"
    say "between the parties: $shape"
fi

# --- the parties ---

for party in 0 1 2; do
    mapfile -t where < <(inside "$PREFIX-$id-$party")
    launch "$workdir/party$party/log" "${where[@]}" \
        "$bin/mimir-peer" run --config "$workdir/party$party/party.toml"
    parties[party]=$!
done
mapfile -t from < <(inside "$client_space")

alive() {
    local party
    for party in 0 1 2; do
        kill -0 "${parties[party]}" 2>/dev/null && continue
        wait "${parties[party]}" && status=1 || status=$?
        die "$status" "party $party ended"
    done
}
ready() { # every party answers, and sees both others
    "${from[@]}" "$bin/mimir" status --json --federation "$workdir/client.toml" 2>/dev/null |
        "$bin/python" -c '
import json, sys
said = [json.loads(line) for line in sys.stdin]
ok = [all(s["status"]["service"]["peers"].values()) for s in said if s.get("event") == "status" and "status" in s]
sys.exit(not (len(ok) == 3 and all(ok)))'
}
say "starting the three parties"
until ready; do
    alive
    ((SECONDS < READY_SECONDS + ${began:=$SECONDS})) || die 6 "the parties are not ready after $READY_SECONDS s"
    sleep 0.2
done
say "the three parties are up and see each other"

# In the background and waited for, so that a signal is handled at once and not after the command.
run() {
    "$@" <&0 &
    local pid=$! status=0
    pids+=("$pid")
    wait "$pid" || status=$?
    unset 'pids[-1]'
    return "$status"
}
if [[ -n $json ]]; then
    # For programs that go on from here: how to reach the parties, and where things are.
    "$bin/python" -c 'import json, sys
print(json.dumps({"event": "mesh", "prefix": sys.argv[4:], "workdir": sys.argv[1], "pids": sys.argv[2].split(),
                  "tunnel": bool(sys.argv[3])}))' "$workdir" "${parties[*]}" "$tunnel" "${from[@]}"
fi
output=()
[[ -z $json ]] || output=(--json)

say "sharing $model with them"
# Without a subshell: a signal would end that one, and the command would run without a name before ours is heard.
name=${model%/} name=${name##*/}
run "${from[@]}" "$bin/mimir" provision "$model" --federation "$workdir/owner.toml" --name "$name" \
    "${output[@]}" >"$workdir/provision.out"
[[ -z $json ]] || cat "$workdir/provision.out"
# The last word of the last line: the model's digest, by which the client asks for it.
digest=$(grep -oE '[0-9a-f]{64}' "$workdir/provision.out" | tail -n 1)

ask=(--federation "$workdir/client.toml" --model "$digest" --max-new "$max_new" "${output[@]}")
if [[ -n $chat ]]; then
    "${from[@]}" "$bin/mimir" chat "${ask[@]}"
else
    run "${from[@]}" "$bin/mimir" generate --echo "${ask[@]}" -- "$prompt"
fi

if [[ -n $keep ]]; then
    again="--federation $workdir/client.toml"
    say
    say "The parties stay up until Ctrl-C. From another terminal:"
    say "  ${from[*]} $bin/mimir chat $again"
    say "  ${from[*]} $bin/mimir generate \"$prompt\" $again"
    say "  ${from[*]} $bin/mimir status $again"
    [[ -z $attest ]] || say "  ${from[*]} $bin/mimir verify $again"
    up=3
    while ((up)); do
        sleep 1 &
        { wait $! || true; } 2>/dev/null # without bash's own words about a party that was killed
        for party in 0 1 2; do
            pid=${parties[party]}
            [[ -n $pid ]] && ! kill -0 "$pid" 2>/dev/null || continue
            wait "$pid" 2>/dev/null && status=0 || status=$?
            parties[party]='' up=$((up - 1))
            for index in "${!pids[@]}"; do [[ ${pids[index]} != "$pid" ]] || unset "pids[index]"; done
            mapfile -t where < <(inside "$PREFIX-$id-$party")
            say "party $party ended with status $status; its log is $workdir/party$party/log. To start it again:"
            say "  ${where[*]:-} $bin/mimir-peer run --config $workdir/party$party/party.toml"
        done
    done
    die 6 "all three parties ended"
fi
