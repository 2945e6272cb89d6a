"""Keeps what is predicted for each image as it comes: nothing is held in memory, nothing done twice.

Every rank appends to its own part file in OUTPUT, one line per image; when all are done the parts
are joined. A killed run's lines are found again with RESUME.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pytorch_lightning.callbacks import BasePredictionWriter

import config


class PartWriter(BasePredictionWriter):
    """Appends a line per image to this rank's part file, from a thread of its own.

    Args:
        job: what is predicted with what, as one word; part files of another job are not continued.
        target: the file that the parts will be joined into; they lie beside it.
        line: (batch, number in the batch, result as a NumPy array) -> a line of text to keep.
        gather: called with this writer on every rank, when all parts are whole; gives `result`.
    """

    def __init__(self, job: str, target: Path, line, gather):
        super().__init__('batch')
        self.job, self.target, self.line, self.gather = job, target, line, gather

    def parts(self) -> list[Path]:
        return sorted(self.target.parent.glob(f'{self.target.name}.part*'))

    def prepare(self) -> set[str]:
        """Names of the images that a killed run of this job did, with RESUME; rank 0 removes all
        other part files, and cuts off a last line that was not finished."""
        if self.trainer.is_global_zero:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            for part in self.parts():
                with part.open('rb+') as file:
                    if config.RESUME and file.readline() == f'{self.job}\n'.encode():
                        whole = file.tell()
                        for line in file:
                            whole += len(line) if line.endswith(b'\n') else 0
                        file.truncate(whole)
                        continue
                part.unlink()
        self.trainer.strategy.barrier()
        done = set(self.find_lines())
        self.trainer.strategy.barrier()  # nobody writes before all have read
        return done

    def find_lines(self) -> dict[str, tuple[Path, int]]:
        """Image -> (part file, offset of its line); the lines themselves stay on the disk."""
        places = {}
        for part in self.parts():
            with part.open('rb') as file:
                offset = len(file.readline())
                for line in file:
                    places[line.partition(b'/')[0].decode()] = part, offset
                    offset += len(line)
        return places

    def setup(self, trainer, module, stage) -> None:
        self.trainer = trainer

    def on_predict_start(self, trainer, module) -> None:
        part = self.target.with_name(f'{self.target.name}.part{trainer.global_rank}')
        self.file = part.open('ab')
        if not self.file.tell():
            self.file.write(f'{self.job}\n'.encode())
        self.thread, self.pending = ThreadPoolExecutor(1), []

    def write_on_batch_end(
        self, trainer, module, prediction, indices, batch, number, loader
    ) -> None:
        self.pending.append(self.thread.submit(self.write, batch, prediction))
        while len(self.pending) > 4 or (self.pending and self.pending[0].done()):
            self.pending.pop(0).result()

    def write(self, batch: dict, results: list[torch.Tensor]) -> None:
        for number, result in enumerate(results):
            line = self.line(batch, number, result.cpu().numpy())
            self.file.write(f'{batch["img"][number]}/{line}\n'.encode())  # no name has a slash
        self.file.flush()

    def on_predict_end(self, trainer, module) -> None:
        for future in self.pending:
            future.result()
        self.close()
        trainer.strategy.barrier()  # all parts are whole
        self.result = self.gather(self)
        trainer.strategy.barrier()  # all ranks have read them

    def on_exception(self, trainer, module, error) -> None:
        if isinstance(error, KeyboardInterrupt) and trainer.is_global_zero:
            print('stopped; RESUME=True goes on after the images that are done', flush=True)
        if hasattr(self, 'file'):
            self.close()

    def close(self) -> None:
        self.thread.shutdown()
        self.file.close()

    def lines(self, names):
        """The lines of these images, in this order, read one by one."""
        places = self.find_lines()
        files = {part: part.open('rb') for part in self.parts()}
        for name in names:
            part, offset = places[name]
            files[part].seek(offset)
            yield files[part].readline().decode().partition('/')[2].rstrip('\n')
        for file in files.values():
            file.close()

    def remove_parts(self) -> None:
        for part in self.parts():
            part.unlink()
