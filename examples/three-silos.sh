#!/usr/bin/env bash
# One server and three silos on this machine, over TLS, each with a data file of its own. One silo is killed in the
# middle of training and comes back. Ends with the adapter and the report under OUT/run.
#
#     examples/three-silos.sh [OUT]
#
# ROUNDS, STEPS and PORT change what it does; FEDEAT is the command, where it is not on the PATH.
set -euo pipefail

out=${1:-three-silos}
rounds=${ROUNDS:-6}
steps=${STEPS:-6}
port=${PORT:-9092}
fedeat=${FEDEAT:-fedeat}
python=$(dirname "$(command -v "$fedeat")")/python

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
cd "$out"

# The demo's small world and the small model that ships along: three tasks, three silos.
"$python" - "$rounds" "$steps" <<'PYTHON'
import sys
from pathlib import Path

import tomli_w

from fedeat import demo

rounds, steps = map(int, sys.argv[1:])
data = demo.write_data(Path("data"), seed=demo.SEED, train=300, test=60, pairs=30)
settings = {
    "threads": 1,
    "model": {"name": str(demo.MODEL)},
    "lora": {"rank": 8, "alpha": 32.0},
    "data": {"template": "plain", "max_length": 128},
    "partition": {"kind": "file"},
    "federation": {"rounds": rounds},
    "communication": {"encoding": "bfloat16", "grace_s": 20.0},
    "client": {"batch_size": 12, "max_steps": steps, "learning_rate": 1.2e-2, "schedule": "linear"},
    "perturbation": {"radius": 0.1, "steps": 1, "objective": "mixed", "radius_warmup": 3},
    "evaluation": {"data": [str(path) for path in (*data.test, data.pairs)], "batch_size": 128},
}
Path("config.toml").write_text(tomli_w.dumps(settings))
PYTHON

started=()
finish() {
    for process in "${started[@]}"; do kill -TERM "$process" 2>/dev/null || true; done
    wait || true
}
trap finish EXIT

[ -f keys/ca.pem ] || "$fedeat" keys --out keys --server --node clinic --node bank --node school

"$fedeat" serve --keys keys --port "$port" --state server &
started+=($!)
until (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do kill -0 "${started[0]}"; sleep 0.2; done

join() { # NAME FILE
    "$fedeat" join --superlink "127.0.0.1:$port" --key "keys/$1.key" --ca keys/ca.pem --data "data/$2" --state "silos/$1" &
    started+=($!)
}
join clinic train-sst2.jsonl
join bank train-qqp.jsonl
join school train-qnli.jsonl

# Half way through, kill -9 the bank's SuperNode: its supervisor starts it again, and the rounds go on meanwhile.
(
    until [ -f run/timings.jsonl ] && [ "$(wc -l < run/timings.jsonl)" -ge $((rounds / 2)) ]; do sleep 0.5; done
    victim=$(pgrep -f "supernode.py .*keys/bank.key" | head -n 1)
    echo "three-silos: killing the bank's SuperNode, process $victim"
    kill -9 "$victim"
) &

until "$fedeat" run config.toml --engine flower --superlink "127.0.0.1:$port" --keys keys --out run; do
    # Only what can be tried again is: a run that stopped goes on from its last finished round.
    attempts=$((${attempts:-0} + 1))
    [ "$attempts" -lt 3 ] || exit 1
    sleep 2
done

"$python" - <<'PYTHON'
import json
from pathlib import Path

for line in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()):
    if line["kind"] == "round":
        left_out = {item["client"]: item["reason"][:60] for item in line["rejected"]}
        print(f"round {line['round']}: clients {line['accepted']}", f"left out: {left_out}" if left_out else "")
PYTHON
echo "three-silos: the adapter is in $PWD/run/adapter, the report is $PWD/run/report.html"
