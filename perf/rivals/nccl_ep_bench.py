#!/usr/bin/env python3
"""Runs NCCL EP's own benchmark and moe_perf one after the other on the same shapes and prints both.

  perf/rivals/nccl_ep_bench.py --ep-bench PATH/ep_bench [-g GPUS] [--tokens 4096] [--small 1,16,64,128] [--hidden 7168]
                               [--topk 8] [--experts 256] [--moe-perf build/bin/moe_perf] [--json FILE]

Needs ep_bench of NCCL EP (contrib/nccl_ep of NCCL 2.30 or newer), built with MPI as its documentation says, and mpirun.

ep_bench's figures favour NCCL EP: they are means over the ranks where ours are the slowest rank's, the routing (ncclEpUpdateHandle)
is left out, caches are warm, and rows are BF16.  Its calls are single ones, host time included, so small sizes
are printed twice: the call, and the kernels alone where it was built with CUPTI; ours then is a call of a CUDA graph.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile


def rival(args, algorithm, layout, tokens):
    """{(collective, 'call' | 'kernel'): µs}"""
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(args.gpus), args.ep_bench, "--algorithm", algorithm,
               "--layout", layout, "--tokens", str(tokens), "--hidden", str(args.hidden), "--top-k", str(args.topk),
               "--experts", str(args.experts), "--warmup", "10", "--iters", "30"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, check=False)
    found = {}
    for collective in ("dispatch", "combine"):
        # Host-observed figures come first, the kernels' after them.
        times = re.findall(rf"^{collective.title()}[^:]*: +(?:avg|total|kernel)=([0-9.]+) us", run.stdout, re.MULTILINE)
        for kind, us in zip(("call", "kernel"), times):
            found[collective, kind] = float(us)
    if not found:
        tail = "\n".join((run.stdout + run.stderr).splitlines()[-8:])
        print(f"nccl_ep_bench: ep_bench {algorithm} {layout} {tokens} ended with {run.returncode}:\n{tail}", file=sys.stderr)
    return found


def ours(args, layout, tokens, graph):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ours.json")
        command = [args.moe_perf, "--device", "cuda", "-r", str(args.gpus), "-b", str(tokens), "--hidden", str(args.hidden),
                   "--topk", str(args.topk), "--experts", str(args.experts), "--layout", layout, "-n", "30", "-w", "10", "-c", "0",
                   "--json", path] + (["--graph", "20"] if graph else [])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(path, encoding="utf-8") as f:
            result = json.load(f)["results"][0]
    return {c: result[c]["time_us"] for c in ("dispatch", "combine")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    parser.add_argument("--ep-bench", required=True)
    parser.add_argument("-g", dest="gpus", type=int, default=0)
    parser.add_argument("--tokens", type=numbers, default=[4096])
    parser.add_argument("--small", type=numbers, default=[1, 16, 64, 128])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--moe-perf", default="build/bin/moe_perf")
    parser.add_argument("--timeout", type=int, default=120)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.gpus == 0:
        args.gpus = len(subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout.splitlines())
    cases = [("ht", "flat", "rank", n, False) for n in args.tokens] + [("ll", "expert-major", "padded", n, True) for n in args.small]
    rows, failed = [], False
    print(f"{args.gpus} GPUs, BF16, hidden {args.hidden}, top-k {args.topk}, experts {args.experts}; µs; ratio: NCCL EP over ours")
    print("| | NCCL EP | tokens | call | kernel | ours | call ratio | kernel ratio |\n|---|---|---|---|---|---|---|---|")
    for algorithm, theirs, layout, tokens, graph in cases:
        mine = ours(args, layout, tokens, graph)
        found = rival(args, algorithm, theirs, tokens)
        failed = failed or not found
        for collective in ("dispatch", "combine"):
            row = {"collective": collective, "algorithm": algorithm, "tokens": tokens, "ours_us": mine[collective],
                   "call_us": found.get((collective, "call")), "kernel_us": found.get((collective, "kernel"))}
            rows.append(row)
            cells = ["–" if us is None else f"{us:.1f}" for us in (row["call_us"], row["kernel_us"], row["ours_us"])]
            cells += ["–" if us is None else f"{us / row['ours_us']:.2f}" for us in (row["call_us"], row["kernel_us"])]
            print(f"| {collective} | {algorithm}, {theirs} | {tokens} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
