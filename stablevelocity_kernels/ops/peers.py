"""Ops of a bank in parts whose processes reach one another's memory: one host, GPUs that are peers.

They exist in the compiled CUDA library alone, take addresses in place of the memory of other processes, and wait on the
device for what these do: every process calls them in the same order. `stablevelocity.ShardedReferenceBank` is how they
are meant to be used. A mailbox is memory of one process that all read and write: zero at first, a header of
`HEADER_BYTES`, and then what is exchanged. Its rounds are counted by `peers_gather_`.
"""

from __future__ import annotations

from ._register import define_native

HEADER_BYTES = 512
MAX_PEERS = 32

# bank_draw from parts that are at these addresses (P,), with slots of the whole rings; refs is the own one. The
# processes meet first, a round of mailboxes `meeting`. x_t also goes to all `mailboxes`, `at` bytes into each, by rank.
define_native(
    "bank_draw_parts(Tensor meeting, int part, float seconds, Tensor parts_at, int capacity, Tensor refs, "
    "Tensor counts, Tensor u, Tensor? labels, "
    "Tensor? fallback, Tensor? noise, Tensor? t, str path, float t_min, Tensor? mailboxes, int at) -> "
    "(Tensor x0, Tensor slot, Tensor x_t, Tensor t_set)"
)
# bank_push_ of the rows of all processes into one part of every ring: slot s of ring y is with part (s + y) mod P, as
# its slot s div P. counts and heads are of the whole rings, local_counts (K,) int32 of the part.
define_native(
    "bank_push_part_(Tensor(a!) refs, Tensor(b!) counts, Tensor(c!) heads, Tensor(d!) local_counts, Tensor values, "
    "Tensor labels, bool all_to_last, int capacity, int part, int parts) -> ()"
)
# Up to four tensors of rows of every process, one after the other in all mailboxes (P,), each at a multiple of 256
# bytes behind the header and by rank. The first is converted to the dtype of `like`. ready: not before all have come
# here, which have then read what the last round brought.
define_native(
    "peers_gather_(Tensor mailboxes, int part, float seconds, bool ready, Tensor like, Tensor? a, Tensor? b, "
    "Tensor? c, Tensor? d) -> ()"
)
# What all parts gave for the own rows, `means` and `lses` bytes into the mailboxes, merged; with a and b (N,) float64
# a x + b mean. home: it is in the own mailbox, else in those of the parts. Ends the round that a gather began. source:
# one reference more for each row.
define_native(
    "peers_merge(Tensor mailboxes, int part, float seconds, int means, int lses, bool home, Tensor x, Tensor counts, "
    "Tensor? rings, Tensor? a, Tensor? b, Tensor? source, Tensor? source_lse) -> Tensor"
)
# posterior_part of the rows of all processes, as many of each. True: what it gives is in the mailboxes of those whose
# rows they are, `means` and `lses` bytes into them, by rank; else in mean and lse.
define_native(
    "posterior_part_out(Tensor x, Tensor refs, Tensor alpha, Tensor sigma, Tensor? labels, Tensor? counts, "
    "str precision, Tensor(a!) mean, Tensor(b!) lse, Tensor mailboxes, int part, int means, int lses) -> bool"
)
