# SPDX-License-Identifier: Apache-2.0
"""Loaders for training and validation, and the iterator that is passed to Megatron.

All ranks with the same data-parallel rank build the same loader and so read the same samples; nothing is broadcast. The
order of samples depends only on the total number of workers: one rank with two workers alternates between the
micro-batches of two ranks with one worker each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    SavableDataLoader,
    WorkerConfig,
    get_loader,
    get_savable_loader,
)
from megatron.energon.savable_loader import BasicDataLoader

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.config import DataConfig
from megatron_smar.data.conversations import template_for
from megatron_smar.data.metadataset import open_sources
from megatron_smar.data.rejects import DataError, RejectLog
from megatron_smar.data.state import WORKER_BATCHES, from_plain, to_plain
from megatron_smar.data.task_encoder import ConversationTaskEncoder
from megatron_smar.data.tokens import TextEncoder


def build_train_loader(
    config: DataConfig,
    tokenizer: Any,
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    decode_images: bool = True,
    announce_rejects: bool = True,
) -> SavableDataLoader[VisionLanguageBatch]:
    """Builds the endless, shuffled loader of this data-parallel rank.

    Args:
        config: Data configuration.
        tokenizer: Megatron's tokenizer.
        data_parallel_rank: This rank's index among the ranks that read different samples.
        data_parallel_size: Number of ranks that read different samples.
        decode_images: False on pipeline stages that need no pixels.
        announce_rejects: False on all but one of the ranks that read the same samples, so that each reject is reported
            once.

    Raises:
        DataError: The split does not exist, or is too small for so many workers.
        ValueError: The tokenizer lacks tokens.
    """
    workers = _worker_config(config, data_parallel_rank, data_parallel_size)
    rejects = _reject_log(config, config.data_path, "train", data_parallel_rank, announce_rejects)
    encoder = ConversationTaskEncoder(config, _text_encoder(config, tokenizer), rejects, decode_images=decode_images)
    try:
        sources = open_sources(config.data_path, "train", "--data-path").get_datasets(
            training=True,
            split_part="train",
            worker_config=workers,
            max_samples_per_sequence=config.max_samples_per_sequence,
            decoder=encoder.decoder,
        )
        dataset = encoder.build_train_datasets(
            datasets=sources.datasets,
            blend_mode=sources.blend_mode,
            worker_config=workers,
            batch_size=config.micro_batch_size,
            packing_buffer_size=config.packing_buffer_size,
            shuffle_buffer_size=config.shuffle_buffer_size,
        )
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise DataError(f"--data-path {config.data_path} cannot be read as a training set ({error}).") from error
    return _block_signals_in_workers(get_savable_loader(dataset))


def build_valid_loader(
    config: DataConfig,
    tokenizer: Any,
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    num_batches: int,
    decode_images: bool = True,
    announce_rejects: bool = True,
) -> BasicDataLoader[VisionLanguageBatch]:
    """Builds this data-parallel rank's validation loader, which is not shuffled: each pass reads the same samples.

    A micro-batch that the data does not fill has rows of padding.

    Args:
        config: Data configuration.
        tokenizer: Megatron's tokenizer.
        data_parallel_rank: This rank's index among the ranks that read different samples.
        data_parallel_size: Number of ranks that read different samples.
        num_batches: Maximum number of micro-batches in a pass on this rank.
        decode_images: False on pipeline stages that need no pixels.
        announce_rejects: False on all but one of the ranks that read the same samples, so that each reject is reported
            once.

    Raises:
        DataError: The split does not exist, or has too few samples for so many ranks.
        ValueError: The tokenizer lacks tokens, or `num_batches` is below 1.
    """
    if num_batches < 1:
        raise ValueError(f"Validation needs at least one micro-batch, not {num_batches}: see --eval-iters.")
    path = config.valid_data_path or config.data_path
    flag = "--valid-data-path" if config.valid_data_path else "--data-path"
    workers = _worker_config(config, data_parallel_rank, data_parallel_size)
    rejects = _reject_log(config, path, "valid", data_parallel_rank, announce_rejects)
    encoder = ConversationTaskEncoder(config, _text_encoder(config, tokenizer), rejects, decode_images=decode_images)
    try:
        sources = open_sources(path, "val", flag).get_datasets(
            training=False, split_part="val", worker_config=workers, decoder=encoder.decoder
        )
        dataset = encoder.build_val_datasets(
            datasets=sources.datasets,
            worker_config=workers,
            batch_size=config.micro_batch_size,
            packing_buffer_size=config.packing_buffer_size,
            limit=num_batches,
        )
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise DataError(
            f"{flag} {path} cannot be read as a validation set, a split called `val` ({error}): prepare the data "
            "with --valid FILE, or run without validation (--eval-iters 0)."
        ) from error
    return _block_signals_in_workers(get_loader(dataset))


class EnergonIterator:
    """The iterator that is passed to Megatron as its `external` dataloader.

    Args:
        loader: The loader, from `build_train_loader` or `build_valid_loader`.
        config: The configuration with which the loader was built.
        batches_per_pass: Restart from the first sample after this many micro-batches, so that each evaluation sees the
            same samples; a shorter pass restarts earlier. None for training.
    """

    def __init__(
        self,
        loader: SavableDataLoader[VisionLanguageBatch] | BasicDataLoader[VisionLanguageBatch],
        config: DataConfig,
        *,
        batches_per_pass: int | None = None,
    ) -> None:
        self.loader = loader
        is_train = isinstance(loader, SavableDataLoader)
        self.source = config.data_path if is_train else config.valid_data_path or config.data_path
        self.batches_per_pass = batches_per_pass
        workers = loader.worker_config
        # A state can be resumed only with the same order of samples, which all of these determine.
        self._layout = {
            "data-parallel size": workers.world_size,
            "--num-workers": workers.num_workers,
            "--micro-batch-size": config.micro_batch_size,
            "seed": config.seed,
            "size of the shuffle buffer": config.shuffle_buffer_size,
            "longest run of samples": config.max_samples_per_sequence,
            "--packing-buffer-size": config.packing_buffer_size,
            "--text-only-ratio": config.text_only_ratio,
            **self._packing_settings(config),
            WORKER_BATCHES: [loader.dataset.len_worker(worker) for worker in range(max(1, workers.num_workers))],
        }
        self._iterator: Generator[VisionLanguageBatch] | None = None
        self._batches_left = batches_per_pass

    @staticmethod
    def _packing_settings(config: DataConfig) -> dict[str, Any]:
        """Returns the settings of the packs that wait in a worker's buffer, which would not fit other settings."""
        if config.packing_buffer_size is None:
            return {}
        return {
            "--seq-length": config.seq_length,
            "--packing-max-tiles": config.packing_max_tiles,
            "multiple of lengths in a pack (2 x --context-parallel-size)": config.packing_multiple_of,
            "--conversation-template": config.template,
            "tokens of a tile": config.tokens_per_tile,
            "tiles of images": str(config.image),
        }

    def __iter__(self) -> EnergonIterator:
        """Returns this iterator."""
        return self

    def __next__(self) -> VisionLanguageBatch:
        """Returns the next micro-batch.

        Raises:
            DataError: The data cannot be used.
        """
        if self._batches_left == 0:
            self._finish_pass()
        batch = self._read()
        if batch is None:
            batch = self._read()
        if batch is None:
            raise DataError(f"{self.source} has been read to its end, and none of its samples could be used.")
        if self._batches_left is not None:
            self._batches_left -= 1
        return batch

    def save_state(self) -> dict[str, Any]:
        """Returns this rank's loader state, for `torch.save`; Megatron calls this when it saves a checkpoint."""
        if not isinstance(self.loader, SavableDataLoader):
            raise TypeError("Only the training loader has a state; validation starts over each time.")
        return {"layout": self._layout, "loader": to_plain(self.loader.save_state_rank())}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Resumes from what `save_state` returned; to be called before the first `next`.

        Raises:
            DataError: The state belongs to another data-parallel layout or other settings.
        """
        changed = [
            f"{name} was {state['layout'].get(name)} and is {value}"
            for name, value in self._layout.items()
            if state["layout"].get(name) != value
        ]
        if changed:
            raise DataError(
                f"The data loader's state in the checkpoint does not fit this run ({'; '.join(changed)}): resume with "
                "what it was saved with, or begin at the start of the data with --no-load-dataloader-state."
            )
        assert isinstance(self.loader, SavableDataLoader)
        self.loader.restore_state_rank(from_plain(state["loader"]))

    def close(self) -> None:
        """Ends the worker processes; nothing can be read afterwards.

        The garbage collector would break the loader's reference cycle in an order in which the workers never get their
        shutdown message, and torch would then wait 5 s for each.
        """
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        persistent = getattr(self.loader, "_iterator", None)  # torch has no public way to end persistent workers
        if persistent is not None:
            persistent._shutdown_workers()
        del self.loader

    def _read(self) -> VisionLanguageBatch | None:
        """Returns the next micro-batch, or None at the end of a pass."""
        try:
            if self._iterator is None:
                # torch draws its workers' seed from the generator of dropout: a resumed run would draw once more.
                # The worker processes start with the first batch.
                with torch.random.fork_rng(devices=[]), _blocked_signals():
                    self._iterator = iter(self.loader)
                    return next(self._iterator)
            return next(self._iterator)
        except StopIteration:
            self._iterator = None
            return None
        except DataError as error:
            # A worker's error arrives as text, with its traceback before the message.
            raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None
        except Exception as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DataError(f"Reading the data from {self.source} failed ({what}).") from error

    def _finish_pass(self) -> None:
        """Reads the rest of a pass: energon restarts from the first sample only after the end of a pass."""
        self._batches_left = self.batches_per_pass
        while self._iterator is not None:
            self._read()


def _text_encoder(config: DataConfig, tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer, template_for(config.template, tokenizer).special_tokens, config.modalities)


def _worker_config(config: DataConfig, rank: int, size: int) -> WorkerConfig:
    return WorkerConfig(
        rank=rank,
        world_size=size,
        num_workers=config.num_workers,
        seed_offset=config.seed,
        global_error_handler=_raise_data_error,
        restore_error_handler=_raise_data_error,
    )


_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Holds back the signals that end a run; processes started meanwhile inherit the block and never receive them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _block_signals_in_workers[L: SavableDataLoader[Any] | BasicDataLoader[Any]](loader: L) -> L:
    """Makes the data workers end when the training process ends them, not when all processes receive a signal.

    Ctrl-C and cluster managers signal the workers too, while the training process still has to finish its step.
    """
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None], worker: int) -> None:
    start(worker)
    signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    faulthandler.register(signal.SIGUSR2, file=2)  # the watch for hangs asks for its stacks
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Ends this worker on the parent's SIGTERM, with which Python ends workers that were not shut down in order."""
    while True:
        sent = signal.sigwaitinfo(_END_SIGNALS)
        if sent.si_signo == signal.SIGTERM and sent.si_pid == parent:
            os._exit(0)


def _raise_data_error(error: Exception, sample: Any, sources: Any = None) -> None:
    """Ends the run with one sentence, where energon would print and continue; rejected samples never get here."""
    if isinstance(error, DataError):
        raise error
    places = ", ".join(f"{source.shard_name}[{source.index}] of {source.dataset_path}" for source in sources or [])
    what = f"{type(error).__name__}: {error}"
    raise DataError(f"Reading the data from {places or 'an unknown place'} failed ({what}).") from error


def _reject_log(config: DataConfig, source: str, split: str, rank: int, announce: bool) -> RejectLog:
    return RejectLog(
        name=f"{split}-rank{rank:03d}",
        source=source,
        directory=Path(config.rejects_dir) if config.rejects_dir else None,
        limit=config.max_consecutive_rejects,
        max_skip_ratio=config.max_skip_ratio,
        announce=announce,
    )
