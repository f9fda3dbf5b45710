"""The algorithm in plain numpy: the specification that the C++ core is tested against.

Everything is computed in float64, one kv head at a time, with a short function per step. Speed does not matter here.
The package needs numpy alone; it imports neither llama_cpp nor the native library.

Modules
-------
chunks     delimiter table of a vocabulary, chunk ids of a run of tokens
lookahead  positions of the look-ahead and the rotation of queries to them
attention  proportional attention: softmax over rows that carry a bias
frame      mean and scale of the keys that are quantized
compress   one pass over one kv head: score, winners, clusters, merged rows, fitted bias
paper      the baselines: the paper's method and streaming (sinks and newest tokens)
evict      the baselines: what the eviction methods of others keep
profile    errors of every kv head over its rows: file format, rows per head
calibrate  measuring these errors
"""

from .attention import attend, logits, logsumexp
from .calibrate import TextInput, output_errors, read_in_passes
from .chunks import DELIMITERS, chunk_ids, delimiter_table
from .compress import (
    BIAS_MAX,
    BIAS_MIN,
    DISTINCT,
    LEAST_KEPT,
    N_FIT,
    VOTE_EVERY,
    HeadRows,
    PassInput,
    PassParams,
    PassResult,
    Scores,
    Votes,
    choose_winners,
    cluster,
    compress_head,
    fit_bias,
    fit_values,
    fitted_queries,
    key_differences,
    look_ahead,
    merge_rows,
    query_metric,
    rows_after,
    score,
    take_votes,
    update_scores,
    value_deviations,
    values,
)
from .evict import POLICIES, compress_head_evict
from .frame import key_frame, mean_turn
from .lookahead import horizon_positions, rotate, splitmix64
from .paper import (
    chunk_budgets,
    compress_head_paper,
    compress_head_streaming,
    cosines,
    greedy_clusters,
    threshold_clusters,
)
from .profile import PARTS, Profile, budgets, equal_budgets, error_at, read_profile, steps, write_profile

__all__ = [
    "BIAS_MAX",
    "BIAS_MIN",
    "DELIMITERS",
    "DISTINCT",
    "LEAST_KEPT",
    "N_FIT",
    "PARTS",
    "POLICIES",
    "VOTE_EVERY",
    "HeadRows",
    "PassInput",
    "PassParams",
    "PassResult",
    "Profile",
    "Scores",
    "TextInput",
    "Votes",
    "attend",
    "budgets",
    "choose_winners",
    "chunk_budgets",
    "chunk_ids",
    "cluster",
    "compress_head",
    "compress_head_evict",
    "compress_head_paper",
    "compress_head_streaming",
    "cosines",
    "delimiter_table",
    "equal_budgets",
    "error_at",
    "fit_bias",
    "fit_values",
    "fitted_queries",
    "greedy_clusters",
    "horizon_positions",
    "key_differences",
    "key_frame",
    "logits",
    "logsumexp",
    "look_ahead",
    "mean_turn",
    "merge_rows",
    "output_errors",
    "query_metric",
    "read_in_passes",
    "read_profile",
    "rotate",
    "rows_after",
    "score",
    "splitmix64",
    "steps",
    "take_votes",
    "threshold_clusters",
    "update_scores",
    "value_deviations",
    "values",
    "write_profile",
]
