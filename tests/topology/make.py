#!/usr/bin/env python3
"""Writes the topology fixtures of this folder, in the form in which hwloc exports them.  See README.md."""
import os

GPU, NIC, EFA, BF3, VF, GBE, DISK, VGA = (
    "0302 [10de:2330] [10de:16c1] a1", "0207 [15b3:1021] [15b3:0041] 00", "0200 [1d0f:efa1] [1d0f:efa1] 00",
    "0200 [15b3:a2dc] [15b3:0009] 01", "0207 [15b3:101e] [15b3:0041] 00", "0200 [8086:1563] [8086:0001] 01",
    "0108 [144d:a80a] [144d:aa8b] 00", "0300 [1a03:2000] [1a03:2000] 41")
PORT = "0604 [1000:c030] [1000:100b] b0"


def dev(address, kind):
    return ("dev", address, kind)


def bridge(address, *children):
    """A bridge; an address "bus" alone stands for device 0, function 0."""
    return ("bridge", address, children)


def switch(bus, *devices):
    """Root port bus:01.0, a switch with its upstream port on bus + 1, and its downstream ports on bus + 2."""
    first = int(bus, 16)
    ports = [bridge("%02x:%02x.0" % (first + 2, i), device) for i, device in enumerate(devices)]
    return bridge("%02x:01.0" % first, bridge("%02x:00.0" % (first + 1), *ports))


def root(*children):
    return ("root", None, children)


class Writer:
    def __init__(self, domain_default="0000"):
        self.lines, self.index, self.cpu, self.numa = [], 0, 0, 0

    def emit(self, depth, text):
        self.lines.append("  " * depth + text)

    def gp(self):
        self.index += 1
        return self.index

    @staticmethod
    def full(address):
        return address if address.count(":") == 2 else "0000:" + address

    def buses(self, node):
        kind, address, rest = node
        found = [] if address is None else [int(self.full(address).split(":")[1], 16)]
        if kind != "dev":
            for child in rest:
                found += self.buses(child)
        return found

    def domain(self, node):
        kind, address, rest = node
        if address is not None:
            return self.full(address).split(":")[0]
        return self.domain(rest[0])

    def io(self, node, depth, level):
        kind, address, rest = node
        if kind == "dev":
            self.emit(depth, '<object type="PCIDev" gp_index="%d" pci_busid="%s" pci_type="%s" pci_link_speed="31.507692"/>'
                      % (self.gp(), self.full(address), rest))
            return
        low, high = min(self.buses(node)), max(self.buses(node))
        if kind == "root":
            self.emit(depth, '<object type="Bridge" gp_index="%d" bridge_type="0-1" depth="0" bridge_pci="%s:[%02x-%02x]">'
                      % (self.gp(), self.domain(node), low, high))
        else:
            below = [bus for child in rest for bus in self.buses(child)]
            self.emit(depth, '<object type="Bridge" gp_index="%d" bridge_type="1-1" depth="%d" bridge_pci="%s:[%02x-%02x]" '
                      'pci_busid="%s" pci_type="%s" pci_link_speed="31.507692">'
                      % (self.gp(), level, self.domain(node), min(below), max(below), self.full(address), PORT))
        for child in rest:
            self.io(child, depth + 1, level + 1)
        self.emit(depth, "</object>")

    def sets(self, cpus, nodes):
        cpuset, nodeset = "0x%08x" % sum(1 << c for c in cpus), "0x%08x" % sum(1 << n for n in nodes)
        return 'cpuset="%s" complete_cpuset="%s" nodeset="%s" complete_nodeset="%s"' % (cpuset, cpuset, nodeset, nodeset)

    def numa_node(self, depth, cpus, node):
        self.emit(depth, '<object type="NUMANode" os_index="%d" %s gp_index="%d" local_memory="1073741824"/>'
                  % (node, self.sets(cpus, [node]), self.gp()))

    def cores(self, depth, cpus, node):
        for cpu in cpus:
            self.emit(depth, '<object type="Core" os_index="%d" %s gp_index="%d">' % (cpu, self.sets([cpu], [node]), self.gp()))
            self.emit(depth + 1, '<object type="PU" os_index="%d" %s gp_index="%d"/>' % (cpu, self.sets([cpu], [node]), self.gp()))
            self.emit(depth, "</object>")


def write(name, packages, machine_roots=()):
    """packages: a list, per package, of NUMA nodes; each is its list of root complexes."""
    w = Writer()
    per = 2
    total = sum(len(numas) for numas in packages)
    cpus, nodes = list(range(total * per)), list(range(total))
    w.lines += ['<?xml version="1.0" encoding="UTF-8"?>', '<!DOCTYPE topology SYSTEM "hwloc2.dtd">', '<topology version="2.0">']
    sets = w.sets(cpus, nodes)
    w.emit(1, '<object type="Machine" os_index="0" %s allowed_cpuset="0x%08x" allowed_nodeset="0x%08x" gp_index="%d">'
           % (sets, (1 << len(cpus)) - 1, (1 << len(nodes)) - 1, w.gp()))
    node = 0
    for p, numas in enumerate(packages):
        mine = list(range(node, node + len(numas)))
        w.emit(2, '<object type="Package" os_index="%d" %s gp_index="%d">'
               % (p, w.sets([c for n in mine for c in range(n * per, n * per + per)], mine), w.gp()))
        for roots in numas:
            own = list(range(node * per, node * per + per))
            depth = 3
            if len(numas) > 1:
                w.emit(3, '<object type="Group" %s gp_index="%d" kind="1001" subkind="0">' % (w.sets(own, [node]), w.gp()))
                depth = 4
            w.numa_node(depth, own, node)
            w.cores(depth, own, node)
            for r in roots:
                w.io(r, depth, 0)
            if len(numas) > 1:
                w.emit(3, "</object>")
            node += 1
        w.emit(2, "</object>")
    for r in machine_roots:
        w.io(r, 2, 0)
    w.emit(1, "</object>")
    w.lines.append("</topology>")
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".xml"), "w") as f:
        f.write("\n".join(w.lines) + "\n")


def gpu_nic_switch(bus, nics=1, gpus=1, nic=NIC):
    """A switch with NICs first and GPUs after them, as such boards have them; their buses follow the switch's."""
    first = int(bus, 16) + 3
    devices = [dev("%02x:00.0" % (first + i), nic if i < nics else GPU) for i in range(nics + gpus)]
    devices.append(dev("%02x:00.0" % (first + nics + gpus), DISK))
    return root(switch(bus, *devices))


# 8 GPUs, each with a NIC on its switch; a storage NIC per socket; a slow Ethernet card.
write("hgx-h100", [
    [[root(bridge("00:1c.0", dev("01:00.0", VGA))), gpu_nic_switch("10"), gpu_nic_switch("20"),
      root(bridge("30:01.0", dev("31:00.0", BF3), dev("31:00.1", BF3))), gpu_nic_switch("38"), gpu_nic_switch("50"),
      root(bridge("60:01.0", dev("61:00.0", GBE), dev("61:00.1", GBE)))]],
    [[gpu_nic_switch("90"), gpu_nic_switch("a0"), root(bridge("b0:01.0", dev("b1:00.0", BF3), dev("b1:00.1", BF3))),
      gpu_nic_switch("b8"), gpu_nic_switch("d0")]]])


# Pairs of GPUs, and pairs of NICs on a switch of their own, below one root port (two levels of switches).
def a100_pair(bus):
    b = int(bus, 16)
    inner = bridge("%02x:02.0" % (b + 2), bridge("%02x:00.0" % (b + 5),
                   bridge("%02x:00.0" % (b + 6), dev("%02x:00.0" % (b + 7), NIC)),
                   bridge("%02x:01.0" % (b + 6), dev("%02x:00.0" % (b + 8), NIC))))
    return root(bridge("%02x:01.0" % b, bridge("%02x:00.0" % (b + 1),
                bridge("%02x:00.0" % (b + 2), dev("%02x:00.0" % (b + 3), GPU)),
                bridge("%02x:01.0" % (b + 2), dev("%02x:00.0" % (b + 4), GPU)), inner)))


write("dgx-a100", [[[], [a100_pair("40"), root(bridge("60:01.0", dev("61:00.0", NIC)))], [], [a100_pair("00")]],
                   [[], [a100_pair("c0")], [], [a100_pair("80")]]])

# Cloud machine: 8 GPUs with 4 EFA NICs each on the GPU's switch.
write("ec2-p5", [[[gpu_nic_switch(bus, nics=4, nic=EFA) for bus in half]] for half in
                 (("44", "54", "64", "74"), ("84", "94", "a4", "b4"))])

# Cloud machine whose root buses are flat: 2 GPUs and 1 NIC on each, no bridges.
write("ec2-p4", [[[root(dev(bus + ":1b.0", EFA), dev(bus + ":1c.0", GPU), dev(bus + ":1d.0", GPU)) for bus in half]]
                 for half in (("10", "20"), ("90", "a0"))])

# 4 GPUs and 4 HCAs, each pair on one switch; two sockets of 4 NUMA nodes, of which every second has devices.
write("juwels-booster", [
    [[root(bridge("60:05.2", bridge("61:00.0", dev("62:00.0", VGA))))],
     [root(switch("40", dev("43:00.0", NIC), dev("44:00.0", GPU)))], [],
     [root(switch("00", dev("03:00.0", GPU), dev("04:00.0", NIC)))]],
    [[root(bridge("e0:05.1", dev("e1:00.0", GBE), dev("e1:00.1", GBE)))],
     [root(switch("c0", dev("c3:00.0", NIC), dev("c4:00.0", GPU)))], [],
     [root(switch("80", dev("83:00.0", NIC), dev("84:00.0", GPU)))]]])


# 2 CPUs, each with 2 GPUs and 2 NICs behind root ports of their own (one PCI domain each), and a DPU.
def own_domain(domain, kind, functions=1):
    return root(bridge(domain + ":00:00.0", *[dev("%s:01:00.%d" % (domain, f), kind) for f in range(functions)]))


write("gb200", [[[own_domain("0000", NIC), own_domain("0002", NIC), own_domain("0006", BF3, 2), own_domain("0008", GPU),
                  own_domain("0009", GPU)]],
                [[own_domain("0010", NIC), own_domain("0012", NIC), own_domain("0016", BF3, 2), own_domain("0018", GPU),
                  own_domain("0019", GPU)]]])


# The same GPUs in a cloud machine: per GPU two EFA NICs on its switch and two more below another root complex.
def ec2_gb200(bus, far):
    b, f = int(bus, 16) + 3, int(far, 16) + 3
    return [root(switch(bus, dev("%02x:00.0" % b, EFA), dev("%02x:00.0" % (b + 1), EFA), dev("%02x:00.0" % (b + 2), GPU))),
            root(switch(far, dev("%02x:00.0" % f, EFA), dev("%02x:00.0" % (f + 1), EFA)))]


write("ec2-gb200", [[ec2_gb200("40", "48") + ec2_gb200("50", "58")], [ec2_gb200("90", "98") + ec2_gb200("a0", "a8")]])

# A virtual machine that tells nothing: all devices on one root bus, no locality.
write("flat-vm", [[[]], [[]]], [root(*([dev("00:%02x.0" % (4 + i), GPU) for i in range(8)] +
                                       [dev("00:%02x.0" % (16 + i), VF) for i in range(8)]))])

# A virtual machine that gives each device a PCI domain of its own, but tells the NUMA node.
write("domains-vm", [[[root(dev("%04x:00:00.0" % (1 + i), GPU)) for i in half] +
                      [root(dev("%04x:00:00.0" % (0x101 + i), VF)) for i in half]] for half in (range(0, 4), range(4, 8))])

# Virtual functions next to their physical function, 2 GPUs on one switch with 2 NICs, and 1 GPU that has none near it.
write("sriov", [[[root(switch("10", dev("13:00.0", GPU), dev("14:00.0", GPU), dev("15:00.0", NIC), dev("16:00.0", NIC))),
                  root(bridge("20:01.0", dev("21:00.0", GPU)))]],
                [[root(bridge("80:01.0", dev("81:00.0", NIC), dev("81:00.1", VF), dev("81:00.2", VF), dev("81:00.3", VF)))]]])

# Pure nesting: a GPU whose switch has a NIC, and, below the same root complex, a GPU and a NIC on ports of their own.
write("nested", [[[root(switch("10", dev("13:00.0", GPU), dev("14:00.0", NIC)), bridge("10:02.0", dev("18:00.0", NIC)),
                        bridge("10:03.0", dev("12:00.0", GPU)))]]])
