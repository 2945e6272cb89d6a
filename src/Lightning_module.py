"""CarvanaModel: the network, its loss, its data and its scores, as a LightningModule."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

import cache
import config
import dice_loss
import folds
import metrics
import model_dispatcher
from dataset import CarvanaDataset, EpochSampler, collate


class CarvanaModel(pl.LightningModule):
    """A segmentation model of `config.MODEL_NAME`, trained on some folds and validated on others.

    Every constant of config.py is kept in `hparams`, as plain types, and is read from there: a
    checkpoint alone is enough to rebuild the model, whatever config.py says by then.

    Args:
        train_folds, val_folds: values of kfold in TRAIN_FOLDS.
        pretrained: whether to give the encoder ENCODER_WEIGHTS; a checkpoint brings its own.
        constants: values to take in place of config.py's: those of a checkpoint.
    """

    def __init__(self, train_folds, val_folds, pretrained: bool = True, **constants):
        super().__init__()
        self.save_hyperparameters(
            {
                'train_folds': list(train_folds),
                'val_folds': list(val_folds),
                'pretrained': False,
                **config.constants(),
                **constants,
            }
        )
        constants = self.hparams
        self.model = model_dispatcher.build_model(
            constants.MODEL_NAME,
            weights=constants.ENCODER_WEIGHTS if pretrained else None,
            channels=constants.CHANNELS,
            classes=constants.CLASSES,
        )
        self.model.to(memory_format=torch.channels_last)
        if constants.COMPILE:
            self.model.compile()
        self.loss = dice_loss.build_loss(
            constants.LOSS,
            classes=constants.CLASSES,
            ignore_index=constants.IGNORE_INDEX,
            **constants.LOSS_ARGS,
        )
        self.scores = metrics.Scores()
        for name in ('MODEL_MEAN', 'MODEL_STD'):
            values = 255 * torch.tensor(constants[name]).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.unchecked = []
        self.images = None  # folds.digests of what it was trained and validated on

    @property
    def input_form(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the model was trained on."""
        return *config.pair(self.hparams.CROP_SIZE), self.hparams.CHANNELS

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, CLASSES, H, W) of 8-bit images (N, CHANNELS, H, W), values 0..255."""
        images = (images.float() - self.MODEL_MEAN) / self.MODEL_STD
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        loss = self.loss(self(batch['image']), batch['mask'])
        means = {'on_step': False, 'on_epoch': True, 'sync_dist': True}
        self.log('train_loss', loss, batch_size=len(batch['img']), **means)
        self.unchecked.append((loss.detach(), batch['img']))
        if len(self.unchecked) == self.trainer.log_every_n_steps:
            self.check_losses()
        # Lightning divides each loss by accumulate_grad_batches, also in an epoch's last window,
        # which may hold fewer batches.
        window, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        short = batches % window
        return loss * (window / short) if batch_index >= batches - short else loss

    def check_losses(self) -> None:
        """Stop at a loss that is not finite; asked now and then, as each look waits for the device.

        The scaler's ordinary skipped step has a finite loss: only its gradients overflow.
        """
        if not self.unchecked:
            return
        losses, names = zip(*self.unchecked)
        self.unchecked = []
        for loss, batch in zip(torch.stack(losses).tolist(), names):
            if not -float('inf') < loss < float('inf'):
                advice = f'a lower LR than {self.hparams.LR}'
                if self.trainer.precision == '16-mixed':
                    advice = f"PRECISION='bf16' (or 32) in place of 16, or {advice}"
                raise config.UserMistake(
                    f'the loss is {loss} in epoch {self.current_epoch} at the images '
                    f'{", ".join(batch)}: try {advice}. The last good checkpoint stays'
                )

    def on_train_batch_start(self, batch: dict, batch_index: int) -> None:
        # Dropout then is a function of the epoch as well: a resumed run repeats it. Not earlier, as
        # the start of an epoch draws from the same generator, a resumed one's in another place.
        if batch_index == 0:
            torch.manual_seed(self.hparams.SEED + 1000 * self.current_epoch + self.global_rank)

    def on_train_epoch_start(self) -> None:
        self.log('lr', self.optimizers().param_groups[0]['lr'], sync_dist=True)

    def on_validation_start(self) -> None:
        self.check_losses()
        if self.trainer.world_size > 1:
            # Batch normalisation's averages are each rank's own; checkpoints hold those of rank 0.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        names = self.trainer.val_dataloaders.dataset.names
        self.row = {name: row for row, name in enumerate(names)}

    def validation_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        logits = self(batch['image'])
        prediction = metrics.decide(metrics.activate(logits))
        counts = metrics.count(
            prediction, batch['mask'], self.hparams.CLASSES, self.hparams.IGNORE_INDEX
        )
        rows = torch.tensor([self.row[name] for name in batch['img']], device=self.device)
        self.scores.update(rows, counts, self.loss(logits, batch['mask']))
        return prediction

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.scores.compute(), sync_dist=True)
        self.scores.reset()

    def on_fit_start(self) -> None:
        self.images = folds.digests(self.hparams.val_folds[0])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint['images'] = self.images

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.images = checkpoint.get('images')

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Fused on every device: a run may go on on another one, and brings this setting along.
        return torch.optim.Adam(self.parameters(), lr=self.hparams.LR, fused=True)

    def hand_on(self, folder: Path, threshold: float) -> None:
        """Write the network into a folder for segmentation_models_pytorch.from_pretrained, with what
        its user must know in config.json: `_mean` and `_std` of images scaled to 0..1, ..."""
        facts = {
            'mean': self.hparams.MODEL_MEAN,
            'std': self.hparams.MODEL_STD,
            'input_size': self.input_form[:2],
            'classes': self.hparams.CLASSES,
            'threshold': threshold,
        }
        model_dispatcher.export(self.model, folder, facts)

    def prepare_data(self) -> None:
        """Once per machine, before the workers start: build the cache."""
        if self.hparams.CACHE:
            cache.open_cache()

    def train_dataloader(self) -> DataLoader:
        data = CarvanaDataset(self.hparams.train_folds, train=True)
        batch_size = self.hparams.TRAIN_BATCH_SIZE
        sampler = EpochSampler(data, *self.ranks(), shuffle=True, seed=self.hparams.SEED)
        if self._trainer:
            # Workers are sent the first items before Lightning tells a resumed run's epoch.
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        # A last batch of one image gives batch normalisation nothing to average over.
        lonely = batch_size > 1 and len(sampler) % batch_size == 1
        return self.loader(data, batch_size, sampler, drop_last=lonely)

    def val_dataloader(self) -> DataLoader:
        data = CarvanaDataset(self.hparams.val_folds, train=False)
        sampler = DistributedSampler(data, *self.ranks(), shuffle=False)
        return self.loader(data, self.hparams.VAL_BATCH_SIZE, sampler)

    def ranks(self) -> tuple[int, int]:
        """(number of processes, this one's place); (1, 0) outside a Trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)

    def loader(self, data, batch_size, sampler, drop_last=False) -> DataLoader:
        workers = self.hparams.NUM_WORKERS
        return DataLoader(
            data,
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.device.type == 'cuda',
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )
