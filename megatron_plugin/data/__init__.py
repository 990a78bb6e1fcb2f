"""jsonl lines -> rows of tokens with shifted labels, the same on every rank.

    paths = write_arithmetic(run_dir / "data", seed)                 # or your own jsonl; see messages.py for the accepted forms
    texts = (m.content for c in read_conversations(paths["train"]) for m in c.messages)
    tokenizer = train_tokenizer(texts, run_dir / "tokenizer")        # one rank, then a barrier; or load_tokenizer(directory)
    vocab_size = true_vocab_size(tokenizer)                          # before any padding for tensor parallelism

    bad_lines = BadLines(on_bad_line="skip", max_bad_fraction=0.001)
    rows = load_rows(paths["train"], tokenizer, seq_length=128, train_on="all", bad_lines=bad_lines)
    print(rows.report, f"{len(bad_lines)} bad lines")                # whatever was cut or left out has a number there

    order = RowOrder(len(rows), global_batch, seed, fingerprint=rows.fingerprint())
    order.load_state_dict(checkpoint["data"])                        # on resume; order.state_dict() holds plain ints
    for micro_batch_rows in shard(order.next_step(), dp_rank=r, dp_size=n, micro_batch=m):
        batch = rows.batch(micro_batch_rows)                         # PackedBatch [b, s]; batch.map(lambda x: x.cuda())
        mask = attention_mask(batch.segment_ids)                     # [b, 1, s, s], True = masked out
        # loss: sum(loss_weight * -logp(labels)); N is the count of labels != -100 over the whole step

Stage by stage
    messages.py    one line -> Conversation (roles, contents, which turns are trained, with which weight)
    tokenize.py    Conversation -> Sample (tokens, labels at the same place, weights)            nothing is shifted yet
    packing.py     Samples -> rows; PackedRows.batch shifts labels, weights and columns by one, the only place that does
                   columns: Sample.columns {name: [T]}, values of each token (expert, advantage, old_logp, ...) that losses read as TokenInputs
    prompts.py     Conversation -> Prompt (token ids and the reference answer), for rollouts
    scores.py      how on-distribution each line is, as jsonl that can be taken up again; not part of training
    order.py       which rows belong to a step, and to a rank; knows nothing of tokens
Everything before `shard` is the same on every rank, whatever the layout: ranks read the same file and compute the same rows.

Accuracy: ConversationEncoder(tokenizer).prompt(conversation) is what the model is asked, extract_answer(text) what it answered.
Held-out data: eval_steps(len(rows), global_batch) visits each row once, filled up with blank rows.
Anything wrong with the data is a DataError ("file:line: reason", exit code 4), wrong arguments are a ValueError.
"""

from megatron_plugin.data.arithmetic import SPLITS, extract_answer, generate, write_arithmetic
from megatron_plugin.data.errors import BadLines, DataError
from megatron_plugin.data.load import load_rows
from megatron_plugin.data.messages import Conversation, Message, iter_lines, parse_line, read_conversations
from megatron_plugin.data.order import BLANK_ROW, RowOrder, eval_steps, shard
from megatron_plugin.data.packing import (
    PAD_SEGMENT,
    PackedBatch,
    PackedRows,
    PackingReport,
    attention_mask,
    cu_seqlens,
    pack_samples,
    truncate,
)
from megatron_plugin.data.prompts import Prompt, PromptSet, encode_prompts
from megatron_plugin.data.tokenize import IGNORE_INDEX, ConversationEncoder, Sample, encode_all
from megatron_plugin.data.tokenizer import load_tokenizer, pad_id, train_tokenizer, true_vocab_size

__all__ = [
    "BLANK_ROW",
    "IGNORE_INDEX",
    "PAD_SEGMENT",
    "SPLITS",
    "BadLines",
    "Conversation",
    "ConversationEncoder",
    "DataError",
    "Message",
    "PackedBatch",
    "PackedRows",
    "PackingReport",
    "Prompt",
    "PromptSet",
    "RowOrder",
    "Sample",
    "attention_mask",
    "cu_seqlens",
    "encode_all",
    "encode_prompts",
    "eval_steps",
    "extract_answer",
    "generate",
    "iter_lines",
    "load_rows",
    "load_tokenizer",
    "pack_samples",
    "pad_id",
    "parse_line",
    "read_conversations",
    "shard",
    "train_tokenizer",
    "truncate",
    "true_vocab_size",
    "write_arithmetic",
]
