"""The LightningDataModule: packed global batches of a cell store, in an order that survives a stop.

Lightning loses the state of a loader in two ways (look-ahead batches, and loaders built early by
`estimated_stepping_batches`), so no loader has a state: the order is a pure function of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import lightning as L
import torch

from scfm.data.access import choose
from scfm.data.batch import PackedBatch
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder, Order, mixing_of
from scfm.data.rows import SomeRows
from scfm.data.sampling import SampledOrder, Sampling
from scfm.data.store import CellStore, Codes
from scfm.data.tokens import Tokeniser
from scfm.errors import ScfmError
from scfm.recipe import DataConfig


class CellDataModule(L.LightningDataModule):
    """Serves this rank's packs of every global batch.

    Args:
        store: the cells.
        tokeniser: how a cell becomes tokens.
        config: the recipe's data section.
        train_rows: rows of the store to train on.
        valid_rows: rows held out; may be empty.
        cell_conditions: name -> (N,) condition index of every row of the store.
        seed: key of the order.
    """

    def __init__(
        self,
        store: CellStore,
        tokeniser: Tokeniser,
        config: DataConfig,
        train_rows: SomeRows,
        valid_rows: SomeRows,
        cell_conditions: Mapping[str, Codes],
        seed: int,
    ) -> None:
        super().__init__()
        self.store, self.tokeniser, self.config = store, tokeniser, config
        self.train_rows, self.valid_rows = train_rows, valid_rows
        self.cell_conditions, self.seed = cell_conditions, seed
        self.loader: EpochLoader | None = None
        # `auto` is measured when the devices are there; what reads batches before has one pack of each
        whole = config.cells_per_batch * tokeniser.longest
        self.tokens_per_pack = whole if config.tokens_per_pack == "auto" else config.tokens_per_pack
        self.pack_place = ""  # the device whose memory `auto` was measured on
        self.pack_loaders: list[PackLoader] = []
        self.access = choose(store, config.read)
        self.mixing = mixing_of(store.shuffled)
        self.sampling: Sampling | None = None
        if config.sample_by:
            how = (config.sample_by, config.sample_power, config.sample_weights, config.sample_repeats)
            self.sampling = Sampling.of(store, train_rows, *how, self.access.region)

    @property
    def said(self) -> list[str]:
        """How cells are read and sampled, for the log."""
        return [self.access.said, *([self.sampling.said] if self.sampling else [])]

    def pack_loader(self, rows: SomeRows, *, shuffle: bool, rank: int, world_size: int) -> PackLoader:
        """Return a loader over some rows, as one rank of several sees it; training rows come shuffled and sampled."""
        size = self.config.cells_per_batch
        order: Order = CellOrder(rows, size, self.seed, shuffle, *self.mixing, self.access.region)
        if self.sampling and shuffle:
            order = SampledOrder(self.sampling.groups, self.sampling.shares, size, self.seed)
        packs = PackLoader(
            self.store,
            order,
            self.tokeniser,
            tokens_per_pack=self.tokens_per_pack,
            fill_packs=self.config.fill_packs,
            cell_conditions=self.cell_conditions,
            rank=rank,
            world_size=world_size,
            reader=self.access.reader,
            threads=self.config.threads,
            prefetch=self.config.prefetch,
            pin_memory=torch.cuda.is_available(),
        )
        self.pack_loaders.append(packs)
        return packs

    def trial_pack(self, n_cells: int) -> PackedBatch:
        """Return one pack of so many training cells, to measure a step by."""
        order = CellOrder(self.train_rows, n_cells, self.seed, True, *self.mixing, self.access.region)
        packs = PackLoader(
            self.store,
            order,
            self.tokeniser,
            tokens_per_pack=n_cells * self.tokeniser.longest,
            cell_conditions=self.cell_conditions,
            reader=self.access.reader,
            prefetch=1,
        )
        with closing(packs.batches(epoch=0)) as batches:
            return next(batches)[0]

    def use_packs(self, tokens: int, place: str) -> None:
        """Deal the cells into packs of at most so many tokens from here on, as measured on a device."""
        self.tokens_per_pack, self.pack_place = tokens, place
        for packs in self.pack_loaders:
            packs.tokens_per_pack = tokens

    def train_dataloader(self) -> EpochLoader:
        trainer = self.trainer
        assert trainer is not None
        packs = self.pack_loader(self.train_rows, shuffle=True, rank=trainer.global_rank, world_size=trainer.world_size)
        self.loader = EpochLoader(packs, self)
        return self.loader

    def val_dataloader(self) -> EpochLoader | list[Any]:
        trainer = self.trainer
        assert trainer is not None
        if len(self.valid_rows) == 0:
            return []
        packs = self.pack_loader(
            self.valid_rows, shuffle=False, rank=trainer.global_rank, world_size=trainer.world_size
        )
        return EpochLoader(packs, None)

    def transfer_batch_to_device(
        self, batch: list[PackedBatch], device: torch.device, dataloader_idx: int
    ) -> list[PackedBatch]:
        return [pack.to(device, non_blocking=True) for pack in batch]

    def state_dict(self) -> dict[str, int | str]:
        trainer = self.trainer
        assert trainer is not None
        packs: dict[str, int | str] = {"tokens_per_pack": self.tokens_per_pack, "pack_place": self.pack_place}
        return self.identity() | packs | {"batches": trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int | str]) -> None:
        for name, now in self.identity().items():
            if name not in state_dict:
                raise ScfmError(
                    f"the checkpoint does not say its {name}: an earlier scfm wrote it, which read cells in another "
                    "order; resume it with that version, or start again in another directory"
                )
            before = state_dict[name]
            if before != now:
                was, is_ = (f"{value:,}" if isinstance(value, int) else value for value in (before, now))
                raise ScfmError(
                    f"the checkpoint was trained with {name} {was}, this run has {is_}; "
                    "resume with the same seed, cells, sampling and global batch"
                )
        if self.config.tokens_per_pack == "auto" and state_dict.get("pack_place"):
            self.use_packs(int(state_dict["tokens_per_pack"]), str(state_dict["pack_place"]))

    def identity(self) -> dict[str, int | str]:
        """Return what the order of the cells depends on."""
        return {
            "sampling": self.sampling.key if self.sampling else "of all cells alike",
            "seed": self.seed,
            "cells read together": self.mixing.block,
            "training cells": len(self.train_rows),
            "data.cells_per_batch": self.config.cells_per_batch,
        }


class EpochLoader:
    """Iterates this rank's packs from where the run stands: one global batch is one step, so the step is the place.

    Args:
        packs: the loader of this rank.
        module: the data module that knows the step; None replays epoch 0 every time, so that validation always sees
            the same masks.
    """

    def __init__(self, packs: PackLoader, module: CellDataModule | None) -> None:
        self.packs, self.module = packs, module

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        if self.module is None:
            yield from self.packs.batches(epoch=0)
            return
        assert self.module.trainer is not None
        epoch, start = divmod(self.module.trainer.global_step, len(self.packs))
        while True:
            yield from self.packs.batches(epoch=epoch, start=start)
            epoch, start = epoch + 1, 0
