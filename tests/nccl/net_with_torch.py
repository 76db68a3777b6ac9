#!/usr/bin/env python3
"""Runs NCCL's collectives over the net plugin, on a machine with GPUs and PyTorch.

  tests/nccl/net_with_torch.py [--nodes 2] [--plugin build/lib] [--net MOE] [--bench 8,1048576] [--no-checks]

Every rank pretends to be a node of its own (NCCL_HOSTID), so that all traffic goes through the network; several ranks may
share a GPU.  Data are random from a printed seed and checked exactly.  NCCL_NET names the plugin's network, so that NCCL
cannot fall back to its own in silence.  --net Socket runs the same on NCCL's own transport, for comparison, and
--net MOE,Socket,MOE,Socket the benchmark on both in turns, the checks on the first alone.

Another NCCL than PyTorch's: put its libnccl.so.2 into DIR/nvidia/nccl/lib and set PYTHONPATH=DIR and
LD_PRELOAD=DIR/nvidia/nccl/lib/libnccl.so.2; the version that is printed is the one that ran.
"""
import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time


def nccl_library():
    """The NCCL of this process, PyTorch's or one that was preloaded, and its version."""
    nccl, version = ctypes.CDLL("libnccl.so.2"), ctypes.c_int()
    nccl.ncclGetVersion(ctypes.byref(version))
    return nccl, version.value


def bench(args, torch):
    """Ranks 0 and 1 send to each other, as nccl-tests' sendrecv_perf does: NCCL's own calls, many in the stream at a time, so
    that neither PyTorch nor the host's waiting is timed."""
    nccl, version = nccl_library()

    def ok(result):
        if result != 0:
            raise SystemExit(f"rank {args.rank}: NCCL returned {result}")

    class UniqueId(ctypes.Structure):
        _fields_ = [("internal", ctypes.c_char * 128)]

    unique, path = UniqueId(), args.rendezvous + ".id"
    if args.rank == 0:
        ok(nccl.ncclGetUniqueId(ctypes.byref(unique)))
        with open(path + ".new", "wb") as file:
            file.write(bytes(unique))
        os.rename(path + ".new", path)
    while not os.path.exists(path):
        time.sleep(0.01)
    with open(path, "rb") as file:
        ctypes.memmove(ctypes.byref(unique), file.read(), ctypes.sizeof(unique))
    comm, peer = ctypes.c_void_p(), 1 - args.rank
    ok(nccl.ncclCommInitRank(ctypes.byref(comm), 2, unique, args.rank))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def data(bytes_, rank):
        generator = torch.Generator().manual_seed(args.seed * 1000 + rank)
        return torch.randint(0, 256, (bytes_,), dtype=torch.uint8, generator=generator)

    for bytes_ in args.bench:
        x = data(bytes_, args.rank).cuda()
        y = ~data(bytes_, peer).cuda()  # no byte is right before it has come
        to, of, size, char = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_size_t(bytes_), 0
        calls = max(5, min(1000, (100 << 20) // bytes_))
        times = []
        for turn in range(11):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                nccl.ncclGroupStart()
                nccl.ncclSend(to, size, char, peer, comm, stream)
                nccl.ncclRecv(of, size, char, peer, comm, stream)
                ok(nccl.ncclGroupEnd())
            torch.cuda.synchronize()
            if turn > 0:
                times.append((time.perf_counter() - start) / calls * 1e6)
        wrong = int((y.cpu() != data(bytes_, peer)).sum())
        if wrong:
            raise SystemExit(f"rank {args.rank}: {args.net}: {wrong} of {bytes_} bytes came wrong")
        if args.rank == 0:
            us = sorted(times)[len(times) // 2]
            print(f"{args.net}, NCCL {version}: send and receive of {bytes_} bytes: {us:.1f} us "
                  f"({min(times):.1f} to {max(times):.1f}), {bytes_ / us * 1e-3:.2f} GB/s each way", flush=True)
    ok(nccl.ncclCommDestroy(comm))


def rank_main(args):
    import torch
    import torch.distributed as dist

    rank, nodes = args.rank, args.nodes
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method="file://" + args.rendezvous, rank=rank, world_size=nodes)
    checks = 0

    def inputs(seed, count):
        # Small integers: sums are exact in FP32 whatever their order.
        generators = [torch.Generator().manual_seed(seed * 1000 + r) for r in range(nodes)]
        return [torch.randint(-64, 64, (count,), generator=g).float() for g in generators]

    def check(what, got, want):
        nonlocal checks
        checks += 1
        wrong = int((got.cpu() != want).sum())
        if wrong:
            raise SystemExit(f"rank {rank}: {what}: {wrong} of {want.numel()} elements are wrong")

    for round_, count in enumerate([] if args.no_checks else [1, 3, 1000, 4096, 65537, 1 << 20, (1 << 22) + 5]):
        all_ = inputs(args.seed + round_, count * nodes)
        mine = all_[rank].to(device)
        x = mine[:count].clone()
        dist.all_reduce(x)
        check("all_reduce", x, sum(a[:count] for a in all_))
        out = torch.full((count * nodes,), float("nan"), device=device)
        dist.all_gather_into_tensor(out, mine[:count].contiguous())
        check("all_gather", out, torch.cat([a[:count] for a in all_]))
        out = torch.full((count * nodes,), float("nan"), device=device)
        dist.all_to_all_single(out, mine)
        check("all_to_all", out, torch.cat([a[rank * count:(rank + 1) * count] for a in all_]))
        out = torch.full((count,), float("nan"), device=device)
        dist.reduce_scatter_tensor(out, mine)
        check("reduce_scatter", out, sum(a[rank * count:(rank + 1) * count] for a in all_))
        to, of = (rank + 1) % nodes, (rank - 1) % nodes
        out = torch.full((count,), float("nan"), device=device)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine[:count].contiguous(), to),
                                            dist.P2POp(dist.irecv, out, of)]):
            work.wait()
        check("send and receive", out, all_[of][:count])
    if rank == 0 and checks:
        print(f"{nodes} nodes, NCCL {nccl_library()[1]}: {checks} checks, 0 wrong", flush=True)

    if args.bench and rank < 2:
        bench(args, torch)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--plugin", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../build/lib"))
    parser.add_argument("--net", default="MOE", help="the network, or several, which then take turns")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--timeout", type=int, default=120)
    parser.add_argument("--bench", nargs="?", const="8,1048576,67108864", default="",
                        help="times send and receive, both ways at once, of these sizes in bytes (without a value: 8, 1 MiB, 64 MiB)")
    parser.add_argument("--no-checks", action="store_true", help="for --bench alone")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bench, args.bench = args.bench, [int(size) for size in args.bench.split(",") if size]
    if args.rank >= 0:
        return rank_main(args)
    print(f"seed {args.seed}", flush=True)
    status = 0
    for turn, net in enumerate(args.net.split(",")):
        status |= run_nodes(args, net, bench, checks=turn == 0 and not args.no_checks)
    return status


def run_nodes(args, net, bench, checks):
    """Starts a process for every node and waits for all; 0 if they ended well."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(args.nodes):
            # Both networks on the same interface: Socket goes by NCCL's variable, the plugin by its own.
            env = dict(os.environ, NCCL_HOSTID=f"node{rank}", NCCL_NET=net, NCCL_NVLS_ENABLE="0", NCCL_MNNVL_ENABLE="0",
                       NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_MOE_NET_IFNAME="lo")
            if net != "Socket":
                env["NCCL_NET_PLUGIN"] = "moe"
                env["LD_LIBRARY_PATH"] = args.plugin + ":" + env.get("LD_LIBRARY_PATH", "")
            command = [sys.executable, os.path.abspath(__file__), "--rank", str(rank), "--rendezvous", folder + "/meet",
                       "--nodes", str(args.nodes), "--seed", str(args.seed), "--net", net] + \
                      (["--bench", bench] if bench else []) + ([] if checks else ["--no-checks"])
            ranks.append(subprocess.Popen(command, env=env))
        deadline = time.time() + args.timeout
        status = 0
        for process in ranks:
            try:
                status |= process.wait(max(1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                print(f"{net}: a rank did not end in time", flush=True)
                status = 1
        for process in ranks:
            process.kill()
    return status


if __name__ == "__main__":
    sys.exit(main())
