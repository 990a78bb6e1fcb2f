"""hooks/dropins/trl.py in a real SFTTrainer, and in transformers' Trainer, on a tiny model."""

import inspect

import pytest
import torch

from megatron_plugin.hooks.dropins.trl import loss_func
from tests.tolerances import DROPIN_TRL

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = 61


def _model():
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _rows():
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 9, 7, 4, 6, 10, 3, 8)]
    return [{"input_ids": row, "labels": [-100] * (i % 3) + row[i % 3 :]} for i, row in enumerate(rows)]


@pytest.fixture
def train(tmp_path):
    """train(loss_type, compute_loss_func): (loss of every step, the weights), with gradient accumulation over unequal micro-batches."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2}, "<unk>")),
        pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
    )  # fmt: skip

    def run(loss_type, compute_loss_func=None):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1.0,
            logging_steps=1, report_to=[], use_cpu=True, loss_type=loss_type, bf16=False, save_strategy="no", disable_tqdm=True, seed=5,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, lr_scheduler_type="constant",
            optim="sgd",
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=_model(), args=arguments, train_dataset=datasets.Dataset.from_list(_rows()), processing_class=tokenizer,
            compute_loss_func=compute_loss_func,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])

    return run


def test_the_signature_is_what_trainer_calls():
    assert list(inspect.signature(loss_func("sft")).parameters) == ["outputs", "labels", "num_items_in_batch"]
    assert "compute_loss_func" in inspect.signature(trl.SFTTrainer.__init__).parameters
    assert "compute_loss_func" in inspect.signature(transformers.Trainer.__init__).parameters


@pytest.mark.parametrize("loss, theirs", [("dft", "dft"), ("sft", "nll")])
def test_training_is_trls_own(train, loss, theirs):
    """Two optimizer steps of two unequal micro-batches each; losses are equal in all digits that the trainer logs."""
    own_losses, own_weights = train(theirs)
    our_losses, our_weights = train("nll", loss_func(loss))
    assert len(our_losses) == 2 and our_losses == pytest.approx(own_losses, rel=1e-4)
    start = torch.cat([p.detach().reshape(-1) for p in _model().parameters()])
    assert (our_weights - own_weights).norm() <= DROPIN_TRL * (own_weights - start).norm()
    other, _ = train("nll", loss_func("chord_phi"))
    assert other[0] != pytest.approx(our_losses[0], rel=1e-2), "another loss is another number"


def test_without_a_count_the_batchs_own_tokens_divide():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    outputs = type("Outputs", (), {"logits": logits})
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss_func("sft")(outputs, labels), expected)
    torch.testing.assert_close(loss_func("sft")(outputs, labels, num_items_in_batch=torch.tensor(12)), expected * 6 / 12)
    assert float(loss_func("sft")(outputs, torch.full((2, 5), -100))) == 0.0, "no token: a finite zero"
