"""The chips that kernels are compiled for. None of them needs to be here.

The figures come from the manufacturers: NVIDIA's data sheets and its "CUDA C++
Programming Guide", section "Compute Capabilities", and Google Cloud's TPU pages.
`Gpu.target_config` tells XLA what a process on the GPU itself would tell it. Two
figures are not published:

    latency of a GPU's memory    Jarmusch et al. 2025 (arXiv:2507.10789) measured 658.7
                                 cycles at 1.755 GHz on an H100 and 876.7 cycles at
                                 2.617 GHz on an RTX 5080. A B200 is assumed to have the
                                 latency of an H100.
    clock of a TPU               The peak in bfloat16 from Google Cloud's pages divided
                                 by 2 operations per cell and cycle. A core has 4 arrays
                                 of 128 x 128 cells (v6e and 7x: 256 x 256). The peaks
                                 are 275 (v4), 197, 459, 918 and 2307 TFLOP/s per chip,
                                 for 2, 1, 2, 1 and 2 cores.
"""

import atexit
import dataclasses
import functools
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

KB = 1024


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    It has the attributes of a jax device that our `plan` reads.

    Attributes:
      name: our name.
      kind: jax's name, `device_kind`.
      capability: compute capability, (major, minor).
      core_count: number of streaming multiprocessors (SMs).
      bandwidth: device memory bandwidth, bytes per second.
      memory, l2: size of device memory and of the L2 cache, bytes.
      clock: GHz.
      latency: latency of a load from device memory, seconds.
      sm_shared: shared memory per SM, bytes.
      block_shared: maximum shared memory per block, bytes.
      sm_threads, sm_registers, sm_blocks: maximum resident threads, registers and
        blocks per SM.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    core_count: int
    bandwidth: int
    memory: int
    l2: int
    clock: float
    latency: float
    sm_shared: int = 228 * KB
    block_shared: int = 227 * KB
    sm_threads: int = 2048
    sm_registers: int = 65536
    sm_blocks: int = 32

    platform = "cuda"
    topology = "1x1x1"

    @property
    def compute_capability(self) -> str:
        """Compute capability as a jax device gives it, "9.0"."""
        return "{}.{}".format(*self.capability)

    @property
    def arch(self) -> str:
        """Architecture as ptxas names it, "sm_90a"."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' * self.has_kernels}"

    @property
    def has_kernels(self) -> bool:
        """Whether Mosaic GPU compiles for the chip. If not, it aborts the process."""
        return self.capability >= (9, 0)

    @property
    def target_config(self) -> str:
        """XLA's description of the chip: a GpuTargetConfigProto as text."""
        major, minor = self.capability
        features = "feature_extension: ACCELERATED_FEATURES" * self.has_kernels
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: {48 * KB}
              shared_memory_per_core: {self.sm_shared}
              threads_per_core_limit: {self.sm_threads}
              core_count: {self.core_count}
              fpus_per_core: 128
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              shared_memory_per_block_optin: {self.block_shared}
              registers_per_core_limit: {self.sm_registers}
              registers_per_block_limit: 65536
              cuda_compute_capability {{
                major: {major} minor: {minor} {features}
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 }}
            device_description_str: "{self.kind}"
        """

    @property
    def bytes_to_fly(self) -> float:
        """Bytes in flight per SM that saturate the bandwidth."""
        return self.bandwidth * self.latency / self.core_count

    def resident_blocks(self, registers: int, threads: int, shared: int) -> int:
        """Returns how many blocks of a kernel are resident on one SM.

        Args:
          registers: registers per thread; a warp gets them in units of 256.
          threads: threads per block.
          shared: dynamic shared memory per block, bytes; the driver adds 1 KB.
        """
        warp_registers = -(-registers * 32 // 256) * 256
        return min(
            self.sm_blocks,
            self.sm_threads // threads,
            self.sm_registers // (warp_registers * -(-threads // 32)),
            self.sm_shared // (shared + KB),
        )


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU device as jax sees it.

    Attributes:
      name: our name.
      topology: the smallest slice that libtpu knows.
      bandwidth: HBM bandwidth of the device, bytes per second.
      vmem: VMEM per core, bytes.
      clock: GHz.
      cores: cores per device.
      config: libtpu's name of another configuration, such as a v4's "megacore", where
        its two cores are one device.
    """

    name: str
    topology: str
    bandwidth: int
    vmem: int
    clock: float
    cores: int = 1
    config: str = ""

    platform = "tpu"

    @property
    def arch(self) -> str:
        """Our name, since a TPU's architecture has no other."""
        return self.name


Chip = Gpu | Tpu

# No kernel of ours runs on these. The reference does, and moves bytes that can be
# counted.
T4 = Gpu(
    name="T4",
    kind="Tesla T4",
    capability=(7, 5),
    core_count=40,
    bandwidth=320_000_000_000,
    memory=16_106_127_360,
    l2=4_194_304,
    clock=1.59,
    latency=math.nan,
    sm_shared=64 * KB,
    block_shared=64 * KB,
    sm_threads=1024,
    sm_blocks=16,
)
A100 = Gpu(
    name="A100",
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    core_count=108,
    bandwidth=2_039_000_000_000,
    memory=85_899_345_920,
    l2=41_943_040,
    clock=1.41,
    latency=math.nan,
    sm_shared=164 * KB,
    block_shared=163 * KB,
)
H100 = Gpu(
    name="H100",
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    core_count=132,
    bandwidth=3_352_320_000_000,
    memory=84_942_979_072,
    l2=52_428_800,
    clock=1.98,
    latency=375e-9,
)
H200 = dataclasses.replace(
    H100,
    name="H200",
    kind="NVIDIA H200",
    bandwidth=4_800_000_000_000,
    memory=150_000_000_000,
)
B200 = Gpu(
    name="B200",
    kind="NVIDIA B200",
    capability=(10, 0),
    core_count=148,
    bandwidth=7_672_320_000_000,
    memory=191_514_411_008,
    l2=132_644_864,
    clock=1.965,
    latency=375e-9,
)
RTX5090 = Gpu(
    name="RTX5090",
    kind="NVIDIA GeForce RTX 5090",
    capability=(12, 0),
    core_count=170,
    bandwidth=1_792_000_000_000,
    memory=33_661_911_040,
    l2=100_663_296,
    clock=2.407,
    latency=335e-9,
    sm_shared=100 * KB,
    block_shared=99 * KB,
    sm_threads=1536,
)
GPUS = (H100, H200, B200, RTX5090)

TPUS = (
    Tpu("v4", "v4:2x2x1", 614_000_000_000, vmem=16 * KB * KB, clock=1.05),
    Tpu("v5e", "v5e:2x2", 819_000_000_000, vmem=128 * KB * KB, clock=1.5),
    Tpu("v5p", "v5p:2x2x1", 2_765_000_000_000, vmem=64 * KB * KB, clock=1.75, cores=2),
    Tpu("v6e", "v6e:2x2", 1_640_000_000_000, vmem=128 * KB * KB, clock=1.75),
    Tpu("7x", "tpu7x:2x2x1", 3_690_000_000_000, vmem=64 * KB * KB, clock=2.2),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*GPUS, *TPUS)}


@functools.cache
def device(chip: Chip) -> Any:
    """Returns a jax device to compile for. Nothing can run on it."""
    return devices(chip)[0]


def devices(chip: Chip, topology: str = "") -> list[Any]:
    """Returns the jax devices of a topology, to compile for.

    Args:
      chip: the devices' kind.
      topology: "1x1x4" for GPUs, "v5e:2x4" for TPUs; "" for the smallest.

    Raises:
      RuntimeError: the chip's compiler is not installed: see `make aot`.
    """
    schedules()
    _find_plugins()
    options = {}
    if isinstance(chip, Gpu):
        options = {"topology": topology or "1x1x1", "target_config": chip.target_config}
    elif chip.config:
        options = {"chip_config_name": chip.config}
    name = "" if isinstance(chip, Gpu) else topology or chip.topology
    found = topologies.get_topology_desc(name, platform=chip.platform, **options)
    return list(found.devices)


@functools.cache
def schedules() -> Path:
    """Makes the folder to which libtpu writes the schedules of this process.

    libtpu reads its path from the environment, so call this before libtpu is loaded.
    """
    folder = tempfile.TemporaryDirectory(prefix="schedules-")
    atexit.register(folder.cleanup)
    told = os.environ.get("LIBTPU_INIT_ARGS", "")
    flags = f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{told} {flags}".strip()
    return Path(folder.name)


def target(chip: Chip) -> Any:
    """Returns the device to pass to our `plan`.

    It is the `Gpu` itself for a GPU, since a topology's device lacks the attributes
    that the plan reads. It is the topology's device for a TPU.
    """
    return chip if isinstance(chip, Gpu) else device(chip)


@functools.cache
def _find_plugins() -> None:
    """Makes jax load the CUDA plugin, which JAX_PLATFORMS=cpu would leave out."""
    # Without these variables, libtpu queries the cloud for its location, prints
    # complaints, and lets only one process use it.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    from jax._src import xla_bridge

    jax.devices()
    log = logging.getLogger("jax._src.xla_bridge")
    before = log.level
    log.setLevel(logging.CRITICAL)  # a plugin that is already loaded is harmless
    try:
        xla_bridge.discover_pjrt_plugins()
    finally:
        log.setLevel(before)
