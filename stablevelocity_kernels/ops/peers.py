"""Ops of a bank in parts whose processes reach one another's memory: one host, GPUs that are peers.

They exist in the compiled CUDA library alone, take addresses in place of the memory of other processes, and wait on
the device for what these do: every process calls them in the same order. `stablevelocity.ShardedReferenceBank` is how
they are meant to be used. Addresses are tensors (P,) int64 on the CPU, of `posterior_part_out` also on the device. A
mailbox is memory of one process that all read and write: zero at first, a header of `HEADER_BYTES`, and then what is
exchanged, each tensor at a multiple of 256 bytes and by rank. Waiting ends with an error after `seconds`.
"""

from __future__ import annotations

from ._register import define_native

HEADER_BYTES = 512
MAX_PEERS = 32

# bank_push_ of the rows of all processes, as many of each, into a bank in parts: slot s of ring y is with part
# (s + y) mod P, at parts_at (P,), as its slot s div P. refs is the own part, counts and heads are of the whole rings,
# local_counts (K,) int32 of the part. A round, over when all rows are where they belong. A mailbox holds (2, P N) int64
# behind its header. With `fresh` (K + 1,) int64 the rows may still be on their way when it is over, and are where they
# belong for a bank_draw_parts that is given it, and from the next round of any kind on that all take part in. stage: 0
# for all of it, 1 for what a draw needs beside, and then 2 for the rest, with the same `places` (4 P N,) int64.
define_native(
    "bank_push_parts_(Tensor(a!) refs, Tensor(b!) counts, Tensor(c!) heads, Tensor(d!) local_counts, Tensor values, "
    "Tensor labels, bool all_to_last, int capacity, Tensor parts_at, Tensor mailboxes, int part, float seconds, "
    "Tensor(e!)? fresh=None, Tensor(f!)? places=None, int stage=0) -> ()"
)
# bank_draw from such parts, with slots of the whole rings; x_t goes to `also` (N, *S) float32, too. heads, fresh and
# mailboxes of a push whose rows may still be on their way. between: it runs beside posterior_part_list, the last call,
# and is over when that is, and when the rows that this process pushed are where they belong.
define_native(
    "bank_draw_parts(Tensor parts_at, int capacity, Tensor refs, Tensor counts, Tensor u, Tensor? labels, "
    "Tensor? fallback, Tensor? noise, Tensor? t, str path, float t_min, Tensor(a!)? also, Tensor? heads=None, "
    "Tensor? fresh=None, Tensor? mailboxes=None, int part=0, float seconds=0, bool between=False) -> "
    "(Tensor x0, Tensor slot, Tensor x_t, Tensor t_set)"
)
# Up to four tensors of rows of every process, one after the other in all mailboxes (P,); with `stays`, x in the own
# one alone. Begins a round, and is over when all have come; without a tensor it is a meeting. It overwrites what the
# round before brought, which a merge has ended. Where it is little, each 32 bits travel with the number of the round in
# a word that is its own flag, by way of `words`: bytes into a mailbox, 8 for each 32 bits of all processes.
define_native(
    "peers_gather_(Tensor(a!) own, Tensor mailboxes, int part, float seconds, Tensor? a, Tensor? b, Tensor? c, "
    "Tensor? x, bool stays, int? words) -> ()"
)
# Whether posterior_part of these rows of all processes is a kernel that reads each row x from the mailbox of its
# process and leaves what it gives there: 1 if it does, 2 if it also merges the own rows, 3 if posterior_part_list may
# come before, too; else 0.
define_native("part_goes_home(Tensor x, Tensor refs, Tensor? labels, str precision) -> int")
# posterior_part of the rows of all processes, as many of each; sigma None: at times on a path. With mailboxes it goes
# home: x, mean and lse are where they begin in a mailbox. Else it is in mean and lse. With own_a, own_b and own_c,
# scalars of this process's rows, it begins the round itself: it is then a gather, too, that brings those of all to
# where time_or_alpha, sigma and labels are. own_x: its rows x, if they are not in their place in the own mailbox yet.
# merged (N, *S) float32: on a path, what all parts together predict for the rows merged_x (N, *S) of this process,
# contiguous and aligned to 16 bytes; this ends the round, and what is in the mailbox is not all of it.
define_native(
    "posterior_part_out(Tensor x, Tensor refs, Tensor time_or_alpha, Tensor? sigma, str path, Tensor? labels, "
    "Tensor? counts, str precision, Tensor(a!) mean, Tensor(b!) lse, Tensor? mailboxes, int part, int xs, int means, "
    "int lses, Tensor? own_a=None, Tensor? own_b=None, Tensor? own_c=None, Tensor? own_x=None, int words=0, "
    "float seconds=0, Tensor? addresses=None, Tensor(c!)? merged=None, Tensor? merged_x=None, "
    "str prediction='x0', Tensor(d!)? list=None) -> ()"
)
# What posterior_part_out of those rows begins with, at times on a path, in a launch ahead of the one that writes x: the
# round, and the list of work in the workspace that is then given to it as `list`. own_t (N,) float32 and own_labels are
# of this process's rows; a row below t_min is not evaluated.
define_native(
    "posterior_part_list(Tensor x, Tensor refs, Tensor(a!) t, Tensor(b!)? labels, Tensor? counts, str precision, "
    "Tensor mailboxes, int part, Tensor own_t, Tensor? own_labels, float t_min, int words, float seconds, "
    "Tensor addresses) -> Tensor"
)
# What all parts gave for the own rows, `means` and `lses` bytes into the mailboxes, merged; with a and b (N,) float64,
# or times t (N,) from which they follow, a x + b mean. home: it is in the own mailbox, else in those of the parts. Ends
# the round that a gather began. source: one reference more for each row.
define_native(
    "peers_merge(Tensor mailboxes, int part, float seconds, int means, int lses, bool home, Tensor x, Tensor counts, "
    "Tensor? rings, Tensor? a, Tensor? b, Tensor? t, str path, str prediction, Tensor? source, Tensor? source_lse) -> "
    "Tensor"
)
