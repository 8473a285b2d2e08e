"""The LightningModule: losses of a global batch, accumulated over packs and processes exactly.

One `training_step` is one global batch. Its packs run one after another; only the last backward synchronises gradients.
Every loss is already divided by the global batch's own counts, so that sums over packs and ranks are the global mean,
whatever the number of packs or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.output import ModelOutput
from scfm.model.scgpt import Backbone
from scfm.objectives import Objective
from scfm.recipe import OptimizerConfig
from scfm.training.guard import Guard
from scfm.training.norms import GlobalNorm
from scfm.training.optimizers import build_optimizer, build_schedule
from scfm.training.sharding import ShardedStrategy

Metrics = dict[str, Tensor]


class FoundationModule(L.LightningModule):
    """Trains a network on packed global batches under a weighted sum of objectives.

    Args:
        network: the model; its `forward(batch)` gives a ModelOutput.
        objectives: the terms of the loss.
        optimizer: the recipe's optimizer section.
        seed: key of the dropout draws.
        guard: leaves out updates that would do harm; None takes them all.
    """

    def __init__(
        self,
        network: nn.Module,
        objectives: Sequence[Objective],
        optimizer: OptimizerConfig,
        seed: int = 0,
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.objectives = list(objectives)
        self.optimizer_config = optimizer
        self.seed = seed
        self.guard = guard
        self.missed: dict[tuple[str, ...], list[Tensor]] = {}
        self.step_metrics: Metrics = {}
        self.valid_sums: Metrics = {}
        self.valid_cells = 0

    def configure_model(self) -> None:
        """Cut the network over the processes where the strategy says so."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.cut(self.network)

    def on_fit_end(self) -> None:
        """Put a network that was cut together again: what reads it after training knows nothing of processes."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.network = self.trainer.strategy.joined(self.network)

    def configure_optimizers(self) -> Any:
        scaled = self.trainer.precision == "16-mixed"
        optimizer = build_optimizer(self.network, self.optimizer_config, fused=not scaled)
        self.trainer.fit_loop.setup_data()  # what an epoch holds is not known before
        total_steps = int(self.trainer.estimated_stepping_batches)
        epoch_steps = self.trainer.num_training_batches
        schedule = build_schedule(optimizer, self.optimizer_config, total_steps, epoch_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, packs: list[PackedBatch], batch_idx: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LRScheduler)
        optimizer.zero_grad(set_to_none=True)
        active = [objective for objective in self.objectives if self.global_step >= objective.start_step]
        sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        norms = self.measure_norms(packs, active)
        metrics, pulls = self.global_losses(packs, active, norms)
        for index, pack in enumerate(packs):
            last = index == len(packs) - 1 and not norms
            with self.synchronising(last):
                output = self.look(pack, index, norms)
                loss, pack_metrics = self.pack_losses(pack, output, active)
                for view, pull in enumerate(pulls):
                    if view > 0:
                        output = self.look(pack, index, norms, view)
                    loss = loss + (output.cell * pull[index]).sum()
                # DDP averages gradients over the ranks; the losses are shares of a global mean and must be summed
                loss = loss * self.trainer.world_size
                if last and not sharded:
                    loss = loss + nothing_of(self.unreached(loss, active))
                self.manual_backward(loss)
            add(metrics, pack_metrics)
        self.pull_norms(norms)
        self.step_metrics = metrics
        if sharded:  # what no objective reached learns nothing, as where a backward reaches everything
            for parameter in self.trained():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()

    def try_step(self, pack: PackedBatch) -> None:
        """Take the passes of a step of two such packs, all objectives active; gradients stay, and no update follows."""
        views = max((objective.views for objective in self.objectives if objective.scope == "global"), default=1)
        self.train()
        with self.trainer.precision_plugin.train_step_context():
            for last in (False, True):
                with self.synchronising(last):
                    output = self.look(pack, 0, [])
                    loss, _ = self.pack_losses(pack, output, self.objectives)
                    for view in range(views):
                        if view > 0:
                            output = self.look(pack, 0, [], view)
                        loss = loss + output.cell.sum()
                    loss.backward()

    def look(self, pack: PackedBatch, index: int, norms: Sequence[GlobalNorm], view: int = 0) -> ModelOutput:
        """Pass a pack through the network with the dropout and the norms of a view."""
        self.seed_dropout(index, view)
        if norms:
            norms[view].norm.given = norms[view].mean, norms[view].var
        return self.network(pack)

    def measure_norms(self, packs: list[PackedBatch], objectives: Sequence[Objective]) -> list[GlobalNorm]:
        """Measure what an input norm needs of the global batch, for each view of the cells; nothing without a norm."""
        backbone = getattr(self.network, "backbone", None)
        if not isinstance(backbone, Backbone) or backbone.input_norm is None or backbone.config.padded_batches:
            return []
        views = max([objective.views for objective in objectives if objective.scope == "global"], default=1)
        norms = [GlobalNorm(backbone, packs, partial(self.seed_dropout, view=view)) for view in range(views)]
        torch.clear_autocast_cache()
        return norms

    def pull_norms(self, norms: Sequence[GlobalNorm]) -> None:
        """Hand down the gradient at the statistics of an input norm, and let it learn them; synchronises gradients."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0  # the gradient at hand has been scaled already
        for view, norm in enumerate(norms):
            norm.gather_gradient()
            for index in range(len(norm.packs)):
                last = view == len(norms) - 1 and index == len(norm.packs) - 1
                with self.synchronising(last):
                    loss = norm.pull(index) / scale
                    self.manual_backward(loss + nothing_of(self.trained()) if last else loss)
        if norms:
            norms[0].learn()
            norms[0].norm.given = None

    def trained(self) -> list[Tensor]:
        """Return the parameters that learn."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def unreached(self, loss: Tensor, active: Sequence[Objective]) -> list[Tensor]:
        """Return the parameters that learn but that a loss does not depend on, where these objectives are active.

        DDP waits for the gradient of every parameter. Which ones a backward misses hangs on the objectives alone: the
        graph is walked when these change, rather than at every step (`find_unused_parameters`).
        """
        names = tuple(objective.name for objective in active)
        if names not in self.missed:
            reached, seen, ahead = set(), set(), [loss.grad_fn]
            while ahead:
                node = ahead.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    reached.add(id(getattr(node, "variable", None)))
                    ahead += [function for function, _ in node.next_functions]
            self.missed[names] = [parameter for parameter in self.trained() if id(parameter) not in reached]
        return self.missed[names]

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Let only the last pack's backward synchronise gradients over the ranks."""
        strategy = self.trainer.strategy
        return nullcontext() if last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

    def validation_step(self, packs: list[PackedBatch], batch_idx: int) -> None:
        metrics, _ = self.global_losses(packs, self.objectives, [])
        for pack in packs:
            add(metrics, self.pack_losses(pack, self.network(pack), self.objectives)[1])
        n_cells = packs[0].total_cells
        add(self.valid_sums, {name: value * n_cells for name, value in metrics.items()})
        self.valid_cells += n_cells

    def on_validation_epoch_start(self) -> None:
        self.valid_sums, self.valid_cells = {}, 0

    def on_validation_epoch_end(self) -> None:
        for name, value in self.sum_over_ranks(self.valid_sums).items():
            self.log(f"valid/{name}", value / self.valid_cells, logger=False)

    def pack_losses(
        self, pack: PackedBatch, output: ModelOutput, objectives: Sequence[Objective]
    ) -> tuple[Tensor, Metrics]:
        """Return this pack's share of the weighted loss, and its shares of the metrics (detached)."""
        total = output.cell.new_zeros(())
        metrics: Metrics = {}
        for objective in objectives:
            if objective.scope != "pack":
                continue
            if objective.needs_second_pass:
                second = self.network(pack, cell_prompt=output.cell.detach())
                for name, prediction in second.predictions.items():
                    output.predictions[name.replace("gep", objective.name, 1)] = prediction
            loss, details = objective.loss(pack, output)
            total = total + objective.weight * loss
            metrics |= {objective.name: loss.detach(), **details}
        metrics["loss"] = total.detach()
        return total, metrics

    def global_losses(
        self, packs: list[PackedBatch], objectives: Sequence[Objective], norms: Sequence[GlobalNorm]
    ) -> tuple[Metrics, list[list[Tensor]]]:
        """Return the losses over all cells of the global batch, and their gradient at each pack's cell embeddings.

        A loss between cells (ECS, CCE) does not split over packs and ranks, its gradient at the cell embeddings does:
        the embeddings are computed once without a graph, gathered, and the gradient is handed to each pack's own
        backward. Dropout draws the same numbers in both passes, and others for each view. The gradients stand by view,
        then by pack; there are none without such a loss, and in validation.
        """
        terms = [objective for objective in objectives if objective.scope == "global"]
        if not terms:
            return {}, []
        views: list[Tensor] = []
        with torch.no_grad():
            for view in range(max(objective.views for objective in terms)):
                cells = [self.look(pack, index, norms, view).cell for index, pack in enumerate(packs)]
                views.append(torch.cat(cells).float())  # (N of this rank, D)
        # autocast caches its casts of the weights; those made without a graph must not serve the pass with one
        torch.clear_autocast_cache()
        starts = accumulate((pack.n_cells for pack in packs), initial=0)
        real = torch.cat([start + pack.real_positions for start, pack in zip(starts, packs, strict=False)])
        with torch.enable_grad():
            local = [view.requires_grad_() for view in views]
            everyone = [gather(view.index_select(0, real)) for view in local]  # (N of the global batch, D) each
            losses = {objective.name: objective.loss(*everyone[: objective.views]) for objective in terms}
            weighted = sum(objective.weight * losses[objective.name] for objective in terms)
        pulls: list[list[Tensor]] = []
        if self.training:
            sizes = [pack.n_cells for pack in packs]
            pulls = [list(gradient.split(sizes)) for gradient in torch.autograd.grad(weighted, local)]
        share = 1.0 / self.trainer.world_size
        metrics = {name: loss.detach() * share for name, loss in losses.items()}
        return metrics | {"loss": weighted.detach() * share}, pulls

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here and nowhere else: gradients are summed over packs and ranks, and unscaled, at this point."""
        clip = self.optimizer_config.clip
        if clip == 0 and self.guard is None:
            return
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
        if self.guard is not None:
            active = [o.name for o in self.objectives if self.global_step >= o.start_step]
            bad = self.guard.judge(self.global_step, self.step_metrics["loss"], norm, active)
            self.guard.apply(optimizer, bad, getattr(self.trainer.precision_plugin, "scaler", None) is not None)

    def seed_dropout(self, pack: int, view: int = 0) -> None:
        """Key dropout by (seed, step, pack, view), so that a resumed run draws what an unbroken one would.

        Packs count over all ranks, in the order in which one device would take them: where devices change nothing but
        who takes which pack, they change no draw.
        """
        if self.training:
            place = pack * self.trainer.world_size + self.global_rank
            key = f"{self.seed}/{self.global_step}/{place}/{view}"
            torch.manual_seed(int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "little"))

    def sum_over_ranks(self, metrics: Metrics) -> Metrics:
        """Return metrics summed over the ranks, in one all-reduce."""
        if not metrics or self.trainer.world_size == 1:
            return metrics
        names = sorted(metrics)
        stacked = torch.stack([metrics[name].float() for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, stacked.unbind(), strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scfm_objectives"] = [objective.name for objective in self.objectives]
        checkpoint["scfm_optimizer"] = self.optimizer_config.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, now = checkpoint.get("scfm_objectives"), [objective.name for objective in self.objectives]
        if saved != now:
            raise ScfmError(f"the checkpoint was trained with the objectives {saved}, the recipe names {now}")
        before, name = checkpoint.get("scfm_optimizer", "adamw"), self.optimizer_config.name
        if before != name:
            raise ScfmError(f"optimizer.name: the checkpoint was trained with {before}, the recipe names {name}")


def nothing_of(parameters: Sequence[Tensor]) -> Tensor | float:
    """Return a zero that depends on parameters: a backward that synchronises has to reach them."""
    return torch.stack([parameter.sum() for parameter in parameters]).sum() * 0.0 if parameters else 0.0


def add(sums: Metrics, more: Metrics) -> None:
    """Add metrics to running sums, in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def gather(cells: Tensor) -> Tensor:
    """Return the cells of all ranks, own ones with their graph: (N, D) -> (N over all ranks, D)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return cells
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [torch.zeros(1, dtype=torch.int64, device=cells.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(cells)], device=cells.device))
    counts = [int(size) for size in sizes]
    room = cells.new_zeros(max(counts), cells.shape[1])
    room[: len(cells)] = cells.detach()
    rooms = [torch.empty_like(room) for _ in range(world)]
    dist.all_gather(rooms, room)
    return torch.cat([cells if r == rank else rooms[r][: counts[r]] for r in range(world)])
