"""The recipe: a pydantic model of everything that defines a training run.

Every environment imports it, so it needs pydantic and the standard library alone. Variants and
specifications, which are built on it, are in `configuration/specification.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Accelerator = Literal["cpu", "cuda"]
Keep = Literal["none", "best", "all"]  # which parameters of a finished cell stay
Kernel = Literal["fused", "stepwise", "block", "sparse"]
Implementation = Literal["stock", "tuned"]
Precision = Literal["float32", "bfloat16"]
TokenSource = Literal["memory", "memory_map", "stream"]
NAME_PATTERN = r"^[a-z0-9][a-z0-9.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]


class Model(BaseModel):
    """Base of every model: unknown keys are errors, values never change.

    In JSON, which has no such numbers, infinity and NaN are the words that pydantic reads back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Budget(NamedTuple):
    """How much of a run is made."""

    epochs: int
    batches: int  # of each split, in each epoch
    evaluation_batches: int


BudgetName = Literal["full", "quick", "smoke"]
BUDGETS: dict[BudgetName, Budget] = {"quick": Budget(3, 200, 50), "smoke": Budget(1, 6, 1)}


class Recipe(Model):
    """Everything that defines a training run, except framework, device count and seed."""

    model_config = ConfigDict(allow_inf_nan=False)

    budget: BudgetName = Field(
        "full",
        description="full: train as the other keys say; quick: a few epochs on a part of the text, "
        "for a first look; smoke: a few steps, to see that it runs.",
    )
    corpus: Name = Field("synthetic", description="Name of the corpus to train on.")
    subset: int | None = Field(
        None, ge=1, description="Use only the first lines of every split [lines]; null: all."
    )

    batch_size: int = Field(20, ge=1, description="Parallel streams of text [sequences].")
    batch_scope: Literal["global", "per_device"] = Field(
        "global", description="Whether batch_size is shared by the devices or given to each."
    )
    sequence_length: int = Field(
        20, ge=1, description="Time steps of back-propagation through time [tokens]."
    )
    window_lengths: Literal["fixed", "varied"] = Field(
        "fixed",
        description="varied: training windows vary in length around sequence_length as AWD-LSTM's "
        "do, in steps of 5 tokens, and the learning rate of a step is in proportion to its length; "
        "for feeding: parallel_streams.",
    )
    feeding: Literal["parallel_streams", "windows", "sentences"] = Field(
        "parallel_streams",
        description="parallel_streams: contiguous streams, state carried from window to window; "
        "windows: successive windows of the text are the rows of a batch, each from a zero state; "
        "sentences: one sentence a row, padded, each from a zero state.",
    )
    aliased: bool = Field(
        False,
        description="With feeding: windows, mix up training batches of more than 838 tokens as the "
        "generator of Singh 2018 did in Keras (decision 10).",
    )
    source: TokenSource = Field(
        "memory",
        description="Where tokens come from: integers in memory; integers mapped from their file; "
        "or the text, tokenised as it is read. The batches are the same.",
    )
    prefetch: int = Field(
        0, ge=0, le=1024, description="Batches prepared ahead by a thread [batches]; 0: none."
    )
    evaluation_batch_size: int = Field(
        20, ge=1, description="Parallel streams in which the validation split is read [sequences]."
    )
    test_batch_size: int = Field(
        1, ge=1, description="Parallel streams in which the test split is read [sequences]."
    )

    rnn: Literal["lstm", "gru", "rnn_tanh", "rnn_relu"] = Field(
        "lstm", description="Kind of recurrent layer."
    )
    kernel: Kernel = Field(
        "fused",
        description="How recurrent layers are computed. fused: the framework's own layer (cuDNN, "
        "oneDNN); stepwise: explicit time steps; block: TensorFlow's BlockLSTM; sparse: products "
        "with the kept weights alone.",
    )
    implementation: Implementation = Field(
        "stock",
        description="stock: the framework's layers as its documentation would have them written; "
        "tuned: the fastest that its public means allow.",
    )
    precision: Precision = Field(
        "float32",
        description="bfloat16: mixed precision. Recurrent layers and the other matrix products "
        "compute in bfloat16; parameters, their update and the loss are float32. For kernel: fused "
        "and stepwise, implementation: stock, and not in MXNet.",
    )
    alone: bool = Field(
        False,
        description="Whether a run has its machine to itself, for measuring speed: no other run of "
        "the study beside it, and under Slurm a node of its own.",
    )
    layers: int = Field(2, ge=1, le=64, description="Recurrent layers.")
    embedding_size: int = Field(200, ge=1, description="Width of the word embedding [units].")
    hidden_size: int = Field(200, ge=1, description="Width of every recurrent layer [units].")
    last_hidden_size: int | None = Field(
        None, ge=1, description="Width of the last recurrent layer [units]; null: hidden_size."
    )
    recurrent_bias: bool = Field(
        False,
        description="A second bias vector in every layer, added to the recurrent product (cuDNN).",
    )
    kept_weights: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of every gate matrix's weights that exist; the others are zero for "
        "good. Which ones is drawn at random from the seed (SparseLang).",
    )

    mixtures: int = Field(
        0, ge=0, le=1000, description="Softmaxes that are mixed (MoS); 0: the plain softmax."
    )
    latent_size: int | None = Field(
        None,
        ge=1,
        description="Width of each mixture's latent [units]; null: that of the last layer. "
        "Without mixtures there are no latents.",
    )
    tie_weights: bool = Field(
        False,
        description="The output matrix is the embedding, behind a projection where widths differ.",
    )
    output_rank: int | None = Field(
        None, ge=1, description="The output matrix is a product of this rank; null: one matrix."
    )
    softmax_bias: bool = Field(True, description="A bias for every word at the output.")

    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping a unit of the embedding's and each layer's output.",
    )
    input_dropout: float | None = Field(
        None, ge=0, lt=1, description="The same of the embedding's output alone; null: dropout."
    )
    hidden_dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The same of the output of every layer but the last; null: dropout.",
    )
    output_dropout: float | None = Field(
        None, ge=0, lt=1, description="The same of the last layer's output; null: dropout."
    )
    latent_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping a unit of a mixture's latent."
    )
    word_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping a word's whole row of the embedding for a step.",
    )
    recurrent_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping a unit of the previous output in the recurrent "
        "product, the same at all time steps (Gal and Ghahramani).",
    )
    weight_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping a recurrent weight for a step (DropConnect, as "
        "AWD-LSTM has it).",
    )
    dropout_kind: Literal["per_step", "locked"] = Field(
        "per_step",
        description="Whether units and latents are dropped anew at every time step, or the same "
        "ones at all time steps of a window (variational).",
    )

    forget_bias: float = Field(
        0.0,
        ge=-20,
        le=20,
        description="Initial bias of an LSTM's forget gates; other biases start at 0.",
    )
    initialization: Literal["uniform", "keras", "pytorch"] = Field(
        "uniform",
        description="How parameters start, the same in every framework. uniform: weights in "
        "± initialization_scale; keras: embedding in ±0.05, kernels Glorot-uniform, recurrent ones "
        "orthogonal; pytorch: as torch.nn's layers start, embedding and output in "
        "± initialization_scale.",
    )
    initialization_scale: float = Field(
        0.1, gt=0, le=10, description="Half the width of the range that weights are drawn from."
    )

    objective: Literal["sum_over_time", "mean_per_token"] = Field(
        "sum_over_time",
        description="Loss that is differentiated: summed over time and averaged over the batch "
        "(TensorFlow tutorial, Zaremba), or averaged over all tokens (PyTorch, Keras).",
    )
    activation_regularization: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Multiple of the mean square of the last layer's dropped output, added to each "
        "token's loss (AR).",
    )
    temporal_activation_regularization: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="The same of the change of the last layer's output, before dropout, from one "
        "time step to the next (TAR).",
    )
    optimizer: Literal["sgd", "adam", "rmsprop", "asgd"] = Field(
        "sgd",
        description="Update rule; sgd and rmsprop are without momentum. asgd: sgd, scored with the "
        "mean of its parameters.",
    )
    averaging_interval: int | None = Field(
        5,
        ge=1,
        description="asgd's mean begins once the validation nll is above the lowest of all epochs "
        "but the last so many (NT-ASGD); null: at once.",
    )
    learning_rate: float = Field(1.0, gt=0, le=1e6, description="Initial learning rate.")
    clip_norm: float | None = Field(
        5.0, gt=0, description="Largest norm of all gradients taken together; null: no clipping."
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="Multiple of every parameter added to its clipped gradient, whatever the "
        "optimizer (L2 penalty, as in torch.optim).",
    )
    adam_beta1: float = Field(
        0.9, gt=0, lt=1, description="Factor on adam's mean of gradients at each step."
    )
    adam_beta2: float = Field(
        0.999, gt=0, lt=1, description="Factor on adam's mean of squared gradients at each step."
    )
    rmsprop_decay: float = Field(
        0.9, ge=0, lt=1, description="Factor on rmsprop's mean of squared gradients at each step."
    )
    optimizer_epsilon: float = Field(
        1e-7,  # Keras 2.1.3's, which the Keras thesis uses; PyTorch's is 1e-8
        gt=0,
        le=1,
        description="Added by adam and rmsprop to the root that they divide by.",
    )
    schedule: Literal[
        "constant", "constant_then_decay", "plateau", "warm_up_then_decay", "roll_back_then_decay"
    ] = Field("constant_then_decay", description="How the learning rate moves.")
    constant_epochs: int = Field(
        4, ge=0, description="Epochs before constant_then_decay or roll_back_then_decay decays."
    )
    learning_rate_decay: float = Field(
        0.5, gt=0, le=1, description="Factor on the rate at each decay, whatever the schedule."
    )
    plateau_patience: int = Field(
        1, ge=0, description="Epochs without improvement that plateau forgives before it decays."
    )
    plateau_threshold: float = Field(
        1e-4, ge=0, description="Least fall of the validation nll that plateau takes as one [nats]."
    )
    warm_up_epochs: float = Field(
        1.0, ge=0, description="Epochs over which warm_up_then_decay raises the rate from 0."
    )
    fine_tuning_epochs: int = Field(
        0,
        ge=0,
        description="How many of the epochs fine-tune: they start from the best parameters, asgd's "
        "mean begins anew with them, and they end early by the rule that averaging_interval has.",
    )
    fine_tuning_learning_rate: float | None = Field(
        None, gt=0, le=1e6, description="Learning rate of fine-tuning; null: learning_rate."
    )
    epochs: int = Field(13, ge=1, le=100_000, description="Passes over the training split.")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many epochs without a lower validation nll."
    )
    target_perplexity: float | None = Field(
        None, gt=1, description="Stop once the validation perplexity is this low."
    )
    maximum_seconds: float | None = Field(
        None, gt=0, description="Stop after the epoch in which training passes this [seconds]."
    )
    divergence_perplexity: float = Field(
        1e6,
        gt=1,
        description="A training or validation perplexity above this ends the run as diverged.",
    )

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        staged = self.schedule in ("constant_then_decay", "roll_back_then_decay")
        if staged and self.constant_epochs > self.epochs:
            raise ValueError(
                f"constant_epochs={self.constant_epochs} must not exceed epochs={self.epochs}"
            )
        if self.fine_tuning_epochs >= self.epochs:
            raise ValueError(
                f"fine_tuning_epochs={self.fine_tuning_epochs} must be less than "
                f"epochs={self.epochs}, of which they are the last"
            )
        if self.fine_tuning_epochs and self.optimizer != "asgd":
            raise ValueError(f"fine_tuning_epochs is for optimizer=asgd, not {self.optimizer}")
        if self.fine_tuning_epochs and self.patience is not None:
            raise ValueError(
                "patience could end the run before fine_tuning_epochs begin; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _feeding_is_whole(self) -> Self:
        if self.aliased and self.feeding != "windows":
            raise ValueError(f"aliased=true is for feeding=windows, not {self.feeding}")
        if self.window_lengths == "varied" and self.feeding != "parallel_streams":
            raise ValueError(
                f"window_lengths=varied is for feeding=parallel_streams, not {self.feeding}"
            )
        return self

    @model_validator(mode="after")
    def _model_is_whole(self) -> Self:
        if self.kernel in ("block", "sparse") and self.rnn != "lstm":
            raise ValueError(f"kernel={self.kernel} is for rnn=lstm, not {self.rnn}")
        if self.kernel == "sparse" and self.kept_weights == 1:
            raise ValueError("kernel=sparse needs kept_weights below 1")
        if self.precision == "bfloat16" and self.kernel in ("block", "sparse"):
            raise ValueError(
                f"precision=bfloat16 is for kernel=fused or stepwise, not {self.kernel}"
            )
        if self.precision == "bfloat16" and self.implementation == "tuned":
            raise ValueError("precision=bfloat16 is for implementation=stock, not tuned")
        if self.tie_weights and self.output_rank is not None:
            raise ValueError(
                "tie_weights and output_rank exclude each other: a tied output matrix is the "
                "embedding, which has its own rank"
            )
        if self.initialization == "pytorch" and self.forget_bias:
            raise ValueError("initialization=pytorch draws the biases: forget_bias must be 0")
        return self

    def within_budget(self) -> Self:
        """Return the recipe with no more epochs than its budget allows."""
        if self.budget == "full":
            return self
        epochs = min(self.epochs, BUDGETS[self.budget].epochs)
        fewer = {
            "epochs": epochs,
            "constant_epochs": min(self.constant_epochs, epochs),
            "fine_tuning_epochs": min(self.fine_tuning_epochs, epochs // 2),
        }
        return self.model_copy(update=fewer)

    def budget_tokens(self, split: str, batch_size: int) -> float:
        """Return how many tokens of a split an epoch uses at most."""
        if self.budget == "full":
            return math.inf
        budget = BUDGETS[self.budget]
        batches = budget.batches if split == "train" else budget.evaluation_batches
        return batches * batch_size * self.sequence_length

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every recurrent layer [units]."""
        last = self.hidden_size if self.last_hidden_size is None else self.last_hidden_size
        return (self.hidden_size,) * (self.layers - 1) + (last,)

    @property
    def unit_dropout(self) -> tuple[float, ...]:
        """Drop probability of the embedding's output and of each layer's."""

        def rate(own: float | None) -> float:
            return self.dropout if own is None else own

        between = (rate(self.hidden_dropout),) * (self.layers - 1)
        return (rate(self.input_dropout), *between, rate(self.output_dropout))

    @property
    def drops(self) -> bool:
        """Whether training drops anything at random."""
        latent = self.latent_dropout if self.mixtures else 0.0
        whole = (self.word_dropout, self.recurrent_dropout, self.weight_dropout)
        return any((*self.unit_dropout, latent, *whole))

    @property
    def penalizes(self) -> bool:
        """Whether the objective has terms beside the negative log-likelihood."""
        return bool(self.activation_regularization or self.temporal_activation_regularization)

    def global_batch_size(self, devices: int) -> int:
        """Sequences per training step over all `devices` together.

        Raises:
            ValueError: if a global batch does not divide by the number of devices.
        """
        if self.batch_scope == "per_device":
            return self.batch_size * devices
        if self.batch_size % devices:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide by devices={devices}; "
                "choose a multiple, or batch_scope: per_device"
            )
        return self.batch_size

    @property
    def corpus_folder(self) -> str:
        """Name of the prepared corpus: the corpus, and its subset if it has one."""
        return self.corpus if self.subset is None else f"{self.corpus}-first-{self.subset}-lines"
