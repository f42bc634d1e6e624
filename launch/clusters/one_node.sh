#!/usr/bin/env bash
# One machine with several GPUs: a Ray of its own with a dashboard, the job on it, both gone at the end.
#
#   launch/clusters/one_node.sh recipe=paper run_dir=runs/paper
#   GPUS=4 JOB=launch/collect.py launch/clusters/one_node.sh out=runs/mine teacher=vllm teacher.model=...
#
# Words go to launch/distill.py, or to what JOB names. Without GPUs it runs the embedded default all the same (GPUS=0).
# Checked by shellcheck and bash -n (tests/test_cluster_recipes.py); not yet run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -x .venv/bin/ray ]; then PATH=$PWD/.venv/bin:$PATH; fi
export PATH RAY_USAGE_STATS_ENABLED=0
job=${JOB:-launch/distill.py}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
cluster=(cluster=auto)
if ((gpus == 0)); then cluster=(cluster=local); fi

# Nobody but this machine speaks to it: loopback alone, and ports that are free.
free() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free) dashboard=$(free)
temp=$(mktemp -d -t ray-XXXXXX)
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

ray start --head --block --node-ip-address=127.0.0.1 --port="$port" --temp-dir="$temp" \
	--include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
	--dashboard-agent-listen-port="$(free)" --ray-client-server-port="$(free)" \
	--num-gpus="$gpus" --disable-usage-stats >"$temp/start.log" 2>&1 &
ray=$!
# shellcheck disable=SC2317 # called by the trap
finish() {
	trap - EXIT
	kill "$ray" 2>/dev/null || true
	wait "$ray" 2>/dev/null || true
	rm -rf "$temp"
}
trap finish EXIT

export RAY_ADDRESS=127.0.0.1:$port
until timeout 60 python -c 'import ray; ray.init(log_to_driver=False, logging_level="ERROR")' >/dev/null 2>&1; do
	if ! kill -0 "$ray" 2>/dev/null || ((SECONDS > 600)); then
		cat "$temp/start.log" >&2
		exit 1
	fi
	sleep 1
done
echo "Ray with $gpus GPUs; dashboard: http://127.0.0.1:$dashboard"
python "$job" "${cluster[@]}" cluster.address="$RAY_ADDRESS" "$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' INT TERM
# Until the driver ends, or Ray's head, without which it would wait for long. A signal ends a `wait` and neither of them.
while :; do
	ended='' status=0
	wait -n -p ended "$driver" "$ray" || status=$?
	if [ "${ended:-}" = "$driver" ] || ((status == 127)); then break; fi
	if [ -n "${ended:-}" ]; then
		echo "Ray's head ended (exit code $status), and the job with it; the same command goes on" >&2
		kill -TERM "$driver" 2>/dev/null || true
		wait "$driver" || true
		status=1
		break
	fi
done
exit "$status"
