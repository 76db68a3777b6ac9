#!/usr/bin/env python3
"""Times DeepEP's dispatch and combine as moe_perf times ours, right before moe_perf in the same run, and prints both.

  perf/rivals/deepep_bench.py [-g GPUS] [--tokens 4096] [--hidden 7168] [--topk 8] [--experts 256] [--sms 24,64]
                              [--small 1,16,64,128] [--library v1,v2] [--moe-perf build/bin/moe_perf] [--json FILE]

Needs PyTorch and the Python package deep_ep, installed as its own documentation says.  Of it are timed, unless
--library names fewer: class Buffer (V1; its low-latency kernels too if it was built with NVSHMEM), for 2, 4 or 8 GPUs;
class ElasticBuffer (V2), which wants the NCCL that it was built with, 2.30.4 or newer, in PyTorch too, and
compiles its kernels at their first call.

What is timed is all that a user waits for.  Dispatch: layout and dispatch, including the counts that DeepEP brings to
the host; "no sync": with num_worst_tokens (V2: do_cpu_sync=False), where it does not; "cached": V2 with the handle of
an earlier dispatch instead of the routing.  V2's epilogue kernels are part of its times.  Each iteration the caches are
flushed and the ranks meet on the device; of the slowest rank's times the median counts.  Small sizes: a CUDA graph of
many calls, the time of one; DeepEP's calls and our routing are made for the largest of them.  The routing is uniform
as moe_perf's, drawn anew: bytes agree to a fraction of a per cent.

Ours has the layout of the same name: V1's normal kernels and V2's have rank, V2's with do_expand expert (combine
without weights), V1's low-latency kernels padded.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ITERATIONS, WARMUP, GRAPH_CALLS, GRAPH_LAUNCHES = 20, 5, 20, 20


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    parser.add_argument("-g", dest="gpus", type=int, default=0)
    parser.add_argument("--tokens", type=numbers, default=[4096])
    parser.add_argument("--small", type=numbers, default=[1, 16, 64, 128])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=numbers, default=[24, 64])
    parser.add_argument("--library", type=lambda text: text.split(","), default=["v1", "v2"])
    parser.add_argument("--moe-perf", default="build/bin/moe_perf")
    parser.add_argument("--json")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def quantized(x):
    """e4m3 rows and a scale for each 128 elements, laid out as DeepEP's own benchmark has them."""
    import torch
    blocks = x.float().view(x.size(0), -1, 128)
    scales = blocks.abs().amax(dim=2).clamp(min=1e-4) / 448.0
    q = (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn).view(x.shape)
    return q, scales.T.contiguous().T


def dequantized(q, scales):
    import torch
    return (q.float().view(q.size(0), -1, 128) * scales.unsqueeze(2)).view(q.shape).to(torch.bfloat16)


class Rank:
    """One process of DeepEP's."""

    def __init__(self, args):
        import torch
        import torch.distributed as dist
        self.args, self.rank, self.n = args, args.rank, args.gpus
        self.torch, self.dist = torch, dist
        torch.cuda.set_device(self.rank)
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{args.port}", rank=self.rank, world_size=self.n,
                                device_id=torch.device("cuda", self.rank))
        self.flush = torch.empty(1 << 27, dtype=torch.uint8, device="cuda")
        self.meeting = torch.zeros(1, device="cuda")
        self.path, self.results = os.environ["MOE_RIVAL_RESULTS"], []

    def slowest(self, times):
        gathered = [None] * self.n
        self.dist.all_gather_object(gathered, times)
        return statistics.median(max(column) for column in zip(*gathered))

    def time(self, call):
        """Median µs of single calls."""
        event = lambda: self.torch.cuda.Event(enable_timing=True)
        times = []
        for i in range(WARMUP + ITERATIONS):
            self.torch.cuda.synchronize()
            self.dist.barrier()
            begin, end = event(), event()
            self.flush.fill_(i & 255)
            self.flush.fill_(~i & 255)
            self.dist.all_reduce(self.meeting)  # the ranks' streams go on together
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= WARMUP:
                times.append(begin.elapsed_time(end) * 1e3)
        return self.slowest(times)

    def time_graph(self, call):
        """Median µs of one of many calls in a graph."""
        torch = self.torch
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph, keep = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                keep.append(call())
        times = []
        for i in range(WARMUP + GRAPH_LAUNCHES):
            torch.cuda.synchronize()
            self.dist.barrier()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= WARMUP:
                times.append(begin.elapsed_time(end) * 1e3 / GRAPH_CALLS)
        return self.slowest(times)

    def draw(self, tokens):
        torch, a = self.torch, self.args
        torch.manual_seed(1000 + self.rank)
        x = torch.randn(tokens, a.hidden, dtype=torch.bfloat16, device="cuda")
        idx = torch.rand(tokens, a.experts, device="cuda").topk(a.topk, dim=1).indices
        weights = torch.rand(tokens, a.topk, device="cuda")
        return x, idx, weights

    def note(self, library, collective, kind, layout, tokens, sms, us):
        graph = layout == "padded" or library.endswith("graph")
        self.results.append({"library": library, "collective": collective, "kind": kind, "layout": layout,
                             "tokens": tokens, "sms": sms, "us": us, "graph": graph})
        if self.rank == 0:  # what there is so far, should a later call fail
            with open(self.path, "w", encoding="utf-8") as f:
                json.dump(self.results, f)

    def check(self, combined, x, copies):
        """combined must be each row of x as many times as it had copies."""
        want = x.float() * copies.unsqueeze(1)
        error = ((combined.float() - want).abs().max() / want.abs().max()).item()
        if not error < 0.02:
            raise RuntimeError(f"DeepEP's combine is wrong by {error}: no valid measurement")

    def ranks_of(self, idx):
        """How many ranks each token goes to."""
        ranks = idx // (self.args.experts // self.n)
        return self.torch.zeros(idx.size(0), self.n, device="cuda").scatter_(1, ranks, 1).sum(1)

    def throughput(self, deep_ep):
        a = self.args
        configs, size = {}, 0
        for sms in a.sms:
            deep_ep.Buffer.set_num_sms(sms)
            configs[sms] = (deep_ep.Buffer.get_dispatch_config(self.n), deep_ep.Buffer.get_combine_config(self.n))
            size = max([size] + [c.get_nvl_buffer_size_hint(a.hidden * 2, self.n) for c in configs[sms]])
        buffer = deep_ep.Buffer(self.dist.group.WORLD, size, 0, explicitly_destroy=True)
        for tokens in a.tokens:
            x, idx, weights = self.draw(tokens)
            for sms in a.sms:
                for kind, rows in (("bf16", x), ("fp8", quantized(x))):
                    last = {}

                    def dispatch(worst=0):
                        per_rank, _, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(idx, a.experts)
                        last["out"] = buffer.dispatch(rows, num_tokens_per_rank=per_rank, is_token_in_rank=is_in_rank,
                                                      num_tokens_per_expert=per_expert, topk_idx=idx,
                                                      topk_weights=weights, num_worst_tokens=worst,
                                                      config=configs[sms][0])

                    us = self.time(lambda: dispatch(self.n * tokens))
                    self.note("V1", "dispatch", kind + ", no sync", "rank", tokens, sms, us)
                    self.note("V1", "dispatch", kind, "rank", tokens, sms, self.time(dispatch))
                    if kind == "bf16":
                        received, handle, combined = last["out"][0], last["out"][4], {}

                        def combine():
                            combined["x"] = buffer.combine(received, handle, config=configs[sms][1])[0]

                        self.note("V1", "combine", kind, "rank", tokens, sms, self.time(combine))
                        self.check(combined["x"], x, self.ranks_of(idx))
        buffer.destroy()

    def latency(self, deep_ep):
        a, torch, most = self.args, self.torch, max(self.args.small)
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, a.hidden, self.n, a.experts)
        buffer = deep_ep.Buffer(self.dist.group.WORLD, 0, size, low_latency_mode=True, explicitly_destroy=True,
                                num_qps_per_rank=a.experts // self.n)
        for tokens in a.small:
            x, idx, weights = self.draw(tokens)
            for kind in ("bf16", "fp8 cast"):
                call = lambda: buffer.low_latency_dispatch(x, idx, most, a.experts, use_fp8=kind != "bf16")
                self.note("V1 low latency", "dispatch", kind, "padded", tokens, 0, self.time_graph(call))
            handle = buffer.low_latency_dispatch(x, idx, most, a.experts, use_fp8=False)[2]
            rows = torch.randn(a.experts // self.n, self.n * most, a.hidden, dtype=torch.bfloat16, device="cuda")
            call = lambda: buffer.low_latency_combine(rows, idx, weights, handle)
            self.note("V1 low latency", "combine", "bf16", "padded", tokens, 0, self.time_graph(call))
        buffer.destroy()

    def elastic(self, deep_ep):
        a = self.args
        buffer = deep_ep.ElasticBuffer(self.dist.group.WORLD, num_max_tokens_per_rank=max(a.tokens + a.small),
                                       hidden=a.hidden, num_topk=a.topk, allow_hybrid_mode=False,
                                       explicitly_destroy=True)
        runs = [(tokens, tokens, sms, False) for tokens in a.tokens for sms in a.sms]
        runs += [(tokens, max(a.small), max(a.sms), True) for tokens in a.small]
        for tokens, most, sms, graph in runs:
            library, time_of = ("V2, graph", self.time_graph) if graph else ("V2", self.time)
            x, idx, weights = self.draw(tokens)
            idx = idx.to(deep_ep.topk_idx_t)
            for layout, kind in ((l, k) for l in ("rank", "expert") for k in ("bf16", "fp8")):
                rows, last = x if kind == "bf16" else quantized(x), {}

                def dispatch():
                    last["out"] = buffer.dispatch(rows, topk_idx=idx, topk_weights=weights, num_experts=a.experts,
                                                  num_max_tokens_per_rank=most, num_sms=sms, do_cpu_sync=False,
                                                  do_expand=layout == "expert")
                    return last["out"]

                def combine():
                    last["combined"] = buffer.combine(received, handle, num_sms=sms)[0]
                    return last["combined"]

                self.note(library, "dispatch", kind + ", no sync", layout, tokens, sms, time_of(dispatch))
                received, _, _, handle, _ = dispatch()
                if layout == "rank" and not graph:
                    us = self.time(lambda: buffer.dispatch(rows, handle=handle, num_sms=sms))
                    self.note(library, "dispatch", kind + ", cached", layout, tokens, sms, us)
                if kind == "bf16":
                    self.note(library, "combine", kind, layout, tokens, sms, time_of(combine))
                else:
                    received = dequantized(*received)
                sent = x if kind == "bf16" else dequantized(*rows)
                copies = self.ranks_of(idx)
                self.check(combine(), sent, copies if layout == "rank" else self.torch.full_like(copies, a.topk))
        buffer.destroy()

    def run(self):
        import deep_ep
        if "v2" in self.args.library and hasattr(deep_ep, "ElasticBuffer"):
            self.elastic(deep_ep)
        if "v1" in self.args.library and hasattr(deep_ep, "Buffer"):
            if self.args.tokens:
                self.throughput(deep_ep)
            if self.args.small and hasattr(deep_ep.Buffer, "low_latency_dispatch"):
                self.latency(deep_ep)
        self.dist.barrier()
        self.dist.destroy_process_group()


def ours(args, wanted):
    """{(kind, layout, graph, collective, tokens): µs} of moe_perf, with the library's choice of SMs."""
    kinds = {"bf16": [], "fp8": ["-d", "fp8"], "fp8 cast": ["--quant", "fp8"]}
    layouts = {"rank": [], "expert": ["--layout", "expert", "--weights", "outside"], "padded": ["--layout", "padded"]}
    common = [args.moe_perf, "--device", "cuda", "-g", str(args.gpus), "--hidden", str(args.hidden),
              "--topk", str(args.topk), "--experts", str(args.experts),
              "-n", str(ITERATIONS), "-w", str(WARMUP), "-c", "0"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ours.json")
        for kind, layout, graph in wanted:
            options, sizes = kinds[kind] + layouts[layout], args.tokens
            if graph:
                sizes = args.small
                options += ["--graph", str(GRAPH_CALLS), "--routing-tokens", str(max(sizes))]  # as DeepEP's "most"
            doubled = [min(sizes) << i for i in range(20)]
            if all(n in doubled for n in sizes):  # one run will do
                steps = [["-b", str(min(sizes)), "-e", str(max(sizes)), "-f", "2"]]
            else:
                steps = [["-b", str(n)] for n in sizes]
            for size in steps:
                subprocess.run(common + options + size + ["--json", path], check=True, stdout=subprocess.DEVNULL)
                with open(path, encoding="utf-8") as f:
                    for result in json.load(f)["results"]:
                        for collective in ("dispatch", "combine"):
                            found[kind, layout, graph, collective, result["tokens"]] = result[collective]["time_us"]
    return found


def main():
    args = parse()
    if args.rank >= 0:
        Rank(args).run()
        return 0
    if args.gpus == 0:
        found = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
        args.gpus = len(found.splitlines())
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, MOE_RIVAL_RESULTS=os.path.join(folder, "rival.json"))
        env.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")  # one host: no network is needed, nor looked for
        env.setdefault("EP_DISABLE_GIN", "1")
        command = [sys.executable] + sys.argv + ["-g", str(args.gpus), "--port", str(20000 + os.getpid() % 20000)]
        children = [subprocess.Popen(command + ["--rank", str(r)], env=env) for r in range(args.gpus)]
        while any(child.poll() is None for child in children):
            time.sleep(0.1)
            if any(child.poll() not in (None, 0) for child in children):
                time.sleep(5)  # the others may have something to say too
                for child in children:
                    child.kill()
        status = max(abs(child.wait()) for child in children)
        try:
            with open(env["MOE_RIVAL_RESULTS"], encoding="utf-8") as f:
                theirs = json.load(f)
        except OSError:
            theirs = []
    alike = lambda r: (r["kind"].split(",")[0], r["layout"], r["graph"])
    mine = ours(args, sorted({alike(r) for r in theirs}))
    for r in theirs:
        r["ours_us"] = mine[(*alike(r), r["collective"], r["tokens"])]
    print(f"{args.gpus} GPUs, hidden {args.hidden}, top-k {args.topk}, experts {args.experts}; "
          "µs; ratio: DeepEP over ours")
    print("| | library | rows | layout | tokens | SMs | DeepEP | ours | ratio |\n|---|---|---|---|---|---|---|---|---|")
    for r in theirs:
        print(f"| {r['collective']} | {r['library']} | {r['kind']} | {r['layout']} | {r['tokens']} | "
              f"{r['sms'] or 'all'} | {r['us']:.1f} | {r['ours_us']:.1f} | {r['us'] / r['ours_us']:.2f} |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(theirs, f, indent=1)
    if status != 0:
        print("deepep_bench: a rank of DeepEP's failed", file=sys.stderr)
    return 1 if status != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
