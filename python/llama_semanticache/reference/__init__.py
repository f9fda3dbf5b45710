"""The algorithm in plain numpy: the specification that the C++ core is tested against.

Everything is computed in float64, one kv head at a time, with a short function per step. Speed does not matter here.
The package needs numpy alone; it imports neither llama_cpp nor the native library.

Modules
-------
chunks     delimiter table of a vocabulary, chunk ids of a run of tokens
lookahead  positions of the look-ahead and the rotation of queries to them
attention  proportional attention: softmax over rows that carry a bias
compress   one pass over one kv head: score, winners, clusters, merged rows, fitted bias
paper      the baselines: the paper's method and streaming (sinks and newest tokens)
profile    share of the budget per kv head: file format, interpolation, rows per head, calibration
"""

from .attention import attend, logits, logsumexp
from .chunks import DELIMITERS, chunk_ids, delimiter_table
from .compress import (
    BIAS_MAX,
    BIAS_MIN,
    FADE,
    HeadRows,
    PassInput,
    PassParams,
    PassResult,
    Scores,
    choose_winners,
    cluster,
    compress_head,
    fit_bias,
    look_ahead,
    merge_rows,
    query_metric,
    rows_after,
    score,
    update_scores,
    value_deviations,
)
from .lookahead import horizon_positions, rotate, splitmix64
from .paper import chunk_budgets, compress_head_paper, compress_head_streaming, cosines, greedy_clusters, threshold_clusters
from .profile import (
    RATIOS,
    Profile,
    budgets,
    calibrate,
    equal_shares,
    interpolate,
    read_profile,
    shares_of_scores,
    write_profile,
)

__all__ = [
    "BIAS_MAX",
    "BIAS_MIN",
    "DELIMITERS",
    "FADE",
    "RATIOS",
    "HeadRows",
    "PassInput",
    "PassParams",
    "PassResult",
    "Profile",
    "Scores",
    "attend",
    "budgets",
    "calibrate",
    "choose_winners",
    "chunk_budgets",
    "chunk_ids",
    "cluster",
    "compress_head",
    "compress_head_paper",
    "compress_head_streaming",
    "cosines",
    "delimiter_table",
    "equal_shares",
    "fit_bias",
    "greedy_clusters",
    "horizon_positions",
    "interpolate",
    "logits",
    "logsumexp",
    "look_ahead",
    "merge_rows",
    "query_metric",
    "read_profile",
    "rotate",
    "rows_after",
    "score",
    "shares_of_scores",
    "splitmix64",
    "threshold_clusters",
    "update_scores",
    "value_deviations",
    "write_profile",
]
