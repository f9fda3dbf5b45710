// frame.h - the frame that a head's keys are quantized in, made by the first pass and kept while there are cores
//
// A quantized key is k = mean + scale*H(stored), with H the rotation of sc-quant.h. The stored values of a block share
// one step, so in every channel the error is about scale_e times the same noise, and the noise is as large as the
// stored values are, which is the mean over the channels of (dev_e/scale_e)^2. What a query makes of the error, the sum
// of (ask_e scale_e)^2 times that, is least for scale_e^2 = dev_e/ask_e (Cauchy and Schwarz): dev_e how far keys lie
// from the mean in channel e, ask_e how far queries reach there.
//
// RoPE turns a channel pair of all keys with the position, so their mean over a text is that of the keys turned back to
// position 0, times the mean of the turns to all positions of the context: whole where pairs turn slowly, nothing where
// they turn fast, whatever the part of the text that the first pass sees. What is left out adds to dev. Both channels
// of a pair have the same dev and ask.

#pragma once

#include "load.h"

namespace semcache {

constexpr float FRAME_FLOOR = 1e-3f;                       // least dev and ask, as a part of the greatest
constexpr float FRAME_MIN = 0x1p-10f, FRAME_MAX = 0x1p15f; // range of a scale

struct frame_scratch {
    float *mean, *dev, *ask; // [n_embd_head_k]
    float * x;               // [n_gqa, n_embd_head_k]

    frame_scratch(arena & a, const head_shape & shape);
};

// If pass_args::makes_frame: the frame of the keys of all tokens but sinks, as head_parts::mean and scale. Without
// queries, ask is 1/dev.
void make_frame(const pass_head & h, const pass_rows & x, frame_scratch & t);

} // namespace semcache
