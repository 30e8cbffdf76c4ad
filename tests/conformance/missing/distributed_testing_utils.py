"""Stands in for the starting of processes in transformers' distributed tests, which its sdist lacks: on CPUs, by forking."""

import functools
import os

import torch
import torch.distributed as dist


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _start_rank_processes(function, args, nprocs: int) -> None:
    """Runs `function(rank, *args)` in `nprocs` processes, and raises what one of them raises."""
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="fork")


def _run_rank(rank: int, function, args, world_size: int, port: int) -> None:
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in two processes that form a group."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, args, world_size, store.port), world_size)

        return run

    return decorate
