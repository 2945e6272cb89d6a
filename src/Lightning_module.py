"""CarvanaModel: the network, its loss, its data and its scores, as a LightningModule."""

import math
from functools import cached_property

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

import config
import dataset
import dice_loss
import folds
import images
import metrics
import model_dispatcher

WARM_UP = 0.15  # share of the optimizer steps in which the learning rate rises
FUSED = ('Adam', 'AdamW', 'SGD')  # optimizers with a fused step on every device
# Share of LR at a progress of 0 to 1 after the warm-up. SGDR (arXiv 1608.03983), here to a hundredth,
# and DeepLab (arXiv 1606.00915).
SCHEDULES = {
    'cosine': lambda progress: 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2,
    'poly': lambda progress: (1 - progress) ** 0.9,
}


class NotFinite(config.UserMistake):
    """A loss is NaN or infinite."""


def learning_rate_factor(schedule: str, steps: int):
    """A function for LambdaLR: optimizer step, from 0 -> share of LR. It rises for WARM_UP of the
    steps, then falls."""
    rising = max(2, round(WARM_UP * steps))
    falling = max(1, steps - rising)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return SCHEDULES[schedule](min(1, (step - rising) / falling))

    return factor


class CarvanaModel(pl.LightningModule):
    """A segmentation model of MODEL_NAME, trained on some folds and validated on others.

    All constants of config.py are saved in `hparams`, as plain types, and read from there. So a
    checkpoint is enough to rebuild the model, even if config.py has changed.

    Args:
        train_folds, val_folds: values of kfold in TRAIN_FOLDS.
        pretrained: whether to load ENCODER_WEIGHTS; a checkpoint brings its own weights.
        constants: values that replace those of config.py; they come from a checkpoint.
    """

    def __init__(self, train_folds, val_folds, pretrained: bool = True, **constants):
        super().__init__()
        hparams = {'train_folds': list(train_folds), 'val_folds': list(val_folds)}
        self.save_hyperparameters(hparams | {'pretrained': False} | config.constants() | constants)
        self.model = model_dispatcher.build_model(
            self.hparams.MODEL_NAME,
            weights=self.hparams.ENCODER_WEIGHTS if pretrained else None,
            channels=self.hparams.CHANNELS,
            classes=self.hparams.CLASSES,
        )
        self.model.to(memory_format=torch.channels_last)
        if config.COMPILE:  # from config.py, not from the checkpoint
            self.model.compile(dynamic=False)  # all batches but an epoch's last have one shape
        for name in {'classes', 'ignore_index'} & self.hparams.LOSS_ARGS.keys():
            raise config.UserMistake(f'LOSS_ARGS: remove {name}; set {name.upper()} instead')
        # The rule for images.read_mask, and the value of ignored pixels in the masks.
        self.mask_rule = tuple(self.hparams[name] for name in images.MASK_CONSTANTS)
        self.ignored = images.ignored_value(self.hparams.IGNORE_INDEX)
        self.loss = dice_loss.build_loss(
            self.hparams.LOSS,
            classes=self.hparams.CLASSES,
            ignore_index=self.ignored,
            **self.hparams.LOSS_ARGS,
        )
        self.scores = metrics.Scores()
        for name in ('MODEL_MEAN', 'MODEL_STD'):
            values = 255 * torch.tensor(self.hparams[name]).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.epochs_done = 0  # of a run that is resumed
        self.loss_sum = 0.0  # of the losses since the last check; a tensor during training
        self.image_digests = None  # folds.digests of the images it was trained and validated on

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the model is trained on."""
        return *config.pair(self.hparams.CROP_SIZE), self.hparams.CHANNELS

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (N, CLASSES, H, W) of 8-bit images (N, CHANNELS, H, W), values 0..255."""
        image = image.to(torch.float32, copy=True)  # of its own: changed in place, which is faster
        image.sub_(self.MODEL_MEAN).div_(self.MODEL_STD)
        return self.model(image.contiguous(memory_format=torch.channels_last))

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (N, CLASSES, H, W) of 8-bit images of any size, see metrics.predict_windows."""
        return metrics.predict_windows(self, image, self.input_size[:2], config.VAL_BATCH_SIZE)

    # ------------------------------------------------------------ training
    def build_optimizer(self, parameters) -> torch.optim.Optimizer:
        """OPTIMIZER of torch.optim at LR with OPTIMIZER_ARGS."""
        name, arguments = self.hparams.OPTIMIZER, self.hparams.OPTIMIZER_ARGS
        optimizers = {
            key: value for key, value in vars(torch.optim).items() if isinstance(value, type)
        }
        del optimizers['Optimizer']  # the base class
        if name not in optimizers:
            meant = config.did_you_mean(name, optimizers)
            raise config.UserMistake(
                f"OPTIMIZER: torch.optim has no '{name}'; {meant}valid: {', '.join(optimizers)}"
            )
        # A fused step unscales the gradients of AMP itself, too late to clip them.
        if name in FUSED and self.hparams.GRADIENT_CLIP is None:
            arguments = {'fused': True} | arguments
        return optimizers[name](parameters, lr=self.hparams.LR, **arguments)

    def configure_optimizers(self):
        optimizer = self.build_optimizer(self.parameters())
        if self.hparams.SCHEDULE is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, learning_rate_factor(self.hparams.SCHEDULE, steps))
        return [optimizer], [{'scheduler': schedule, 'interval': 'step'}]

    def try_step(self) -> None:
        """One step of the loss and the optimizer on a tensor of 8 x 8 pixels.

        Raises config.UserMistake if LOSS_ARGS, OPTIMIZER or OPTIMIZER_ARGS do not work.
        """
        logits = torch.nn.Parameter(torch.linspace(-1, 1, 64 * self.hparams.CLASSES))
        mask = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) % 2
        try:
            self.loss(logits.reshape(1, -1, 8, 8), mask).backward()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if not self.hparams.LOSS_ARGS:
                raise
            raise config.UserMistake(
                f'LOSS={self.hparams.LOSS} does not work with LOSS_ARGS={self.hparams.LOSS_ARGS} '
                f'({config.shorten(error)}): correct them'
            ) from None
        try:
            self.build_optimizer([logits]).step()
        except (TypeError, ValueError, RuntimeError) as error:
            if self.hparams.OPTIMIZER == 'Adam' and not self.hparams.OPTIMIZER_ARGS:
                raise
            raise config.UserMistake(
                f'OPTIMIZER={self.hparams.OPTIMIZER} does not work with OPTIMIZER_ARGS='
                f'{self.hparams.OPTIMIZER_ARGS} ({config.shorten(error)}): set another one'
            ) from None

    def on_fit_start(self) -> None:
        self.image_digests = folds.digests(self.hparams.val_folds[0])

    def on_train_epoch_start(self) -> None:
        self.log('lr', self.optimizers().param_groups[0]['lr'], sync_dist=True)

    def on_train_batch_start(self, batch: dict, batch_index: int) -> None:
        # Seed dropout by the epoch, so that a resumed run repeats it. This is after Lightning's
        # own random draws at the start of an epoch, which differ in a resumed run.
        if batch_index == 0:
            torch.manual_seed(self.hparams.SEED + 1000 * self.current_epoch + self.global_rank)

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        loss = self.loss(self(batch['image']), batch['mask'])
        size = len(batch['img'])
        self.log('train_loss', loss, batch_size=size, on_step=False, on_epoch=True, sync_dist=True)
        # A NaN stays in the sum. It is read only now and then, because that waits for the device.
        self.loss_sum = self.loss_sum + loss.detach()
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:
            self.check_losses()
        return loss

    def check_losses(self) -> None:
        """Raise NotFinite if a loss since the last check is not finite.

        If the GradScaler skips a step, the loss is finite, and nothing is raised.
        """
        self.check_finite(float(self.loss_sum), 'the loss')
        self.loss_sum = 0.0

    def check_finite(self, loss: float, name: str) -> None:
        """Raise NotFinite for a loss that is NaN or infinite."""
        if math.isfinite(loss):
            return
        advice = f'start again with a lower LR than {self.hparams.LR}'
        if self.trainer.precision == '16-mixed':
            advice = f"run again with RESUME=True PRECISION='bf16' (or 32), or {advice}"
        raise NotFinite(f'{name} is {loss} in epoch {self.current_epoch + 1}: {advice}')

    # ------------------------------------------------------------ validation
    def on_validation_start(self) -> None:
        self.check_losses()  # before anything is saved
        if self.trainer.world_size > 1:
            # Each rank has its own batch norm statistics. Checkpoints hold those of rank 0.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        """Returns the predicted class indices, uint8 (N, H, W)."""
        logits = self.predict(batch['image'])
        prediction = metrics.decide(metrics.activate(logits))
        counts = metrics.count(prediction, batch['mask'], self.hparams.CLASSES, self.ignored)
        self.scores.update(batch['row'], counts, self.loss(logits, batch['mask']))
        return prediction

    def on_validation_epoch_end(self) -> None:
        scores = self.scores.compute()
        self.scores.reset()
        self.check_finite(scores['val_loss'].item(), 'val_loss')
        self.log_dict(scores, sync_dist=True)

    # ------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint['image_digests'] = self.image_digests

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.image_digests = checkpoint.get('image_digests')
        self.epochs_done = checkpoint.get('epoch', -1) + 1

    def load_model(self, checkpoint: dict) -> bool:
        """Load the whole model of a checkpoint of the same MODEL_NAME and CHANNELS. A head of other
        CLASSES stays as it is.

        Returns: whether the head was loaded, too.
        """
        weights = checkpoint['state_dict']
        same = checkpoint['hyper_parameters']['CLASSES'] == self.hparams.CLASSES
        if not same:
            head = 'model.segmentation_head.'
            weights = {name: w for name, w in weights.items() if not name.startswith(head)}
        self.load_state_dict(weights, strict=same)
        return same

    # ------------------------------------------------------------ data
    @cached_property
    def train_data(self) -> dataset.CarvanaDataset:
        """Kept, because with SCALE it reads the headers of all images."""
        return dataset.CarvanaDataset(self.hparams.train_folds, train=True)

    def train_dataloader(self) -> DataLoader:
        data, batch_size = self.train_data, self.hparams.TRAIN_BATCH_SIZE
        sampler = dataset.EpochSampler(data, *self.ranks(), shuffle=True, seed=self.hparams.SEED)
        # Workers prefetch the first items before Lightning sets a resumed run's epoch.
        sampler.set_epoch(self.epochs_done)
        # Batch norm cannot average over a last batch of one image.
        drop_last = batch_size > 1 and len(sampler) % batch_size == 1
        return self.build_loader(sampler, batch_size, drop_last)

    def val_dataloader(self) -> DataLoader:
        data = dataset.CarvanaDataset(self.hparams.val_folds, train=False)
        sampler = DistributedSampler(data, *self.ranks(), shuffle=False)
        # With SCALE, images have sizes of their own.
        batch_size = self.hparams.VAL_BATCH_SIZE if self.hparams.SCALE is None else 1
        return self.build_loader(sampler, batch_size)

    def ranks(self) -> tuple[int, int]:
        """(number of processes, this one's rank); (1, 0) without a Trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)

    def build_loader(self, sampler, batch_size: int, drop_last: bool = False) -> DataLoader:
        workers = self.hparams.NUM_WORKERS
        return DataLoader(
            sampler.dataset,
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=dataset.collate,
            num_workers=workers,
            pin_memory=self.device.type == 'cuda',
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )
