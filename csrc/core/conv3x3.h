// A convolution of 3x3 taps, stride 1 and padding 1, of channels_last float32 images by Winograd's products:
//
//   y = A^T [ sum_c (G g G^T) * (B^T d B) ] A + bias
//
// for a tile of outputs y from the tile d of inputs around them. Sources: Lavin and Gray 2016 (arXiv 1509.09308),
// section 4; the form of upsampled images follows from it, see ConvForm.
//
// The bits of an output depend on the inputs of its tile alone: not on the batch, the place in it or threads, and AVX2
// and AVX-512 agree. An input that is not finite spoils the outputs that read it, with f4 others of their tile too.
#pragma once

#include "args.h"

namespace dk {

enum class ConvForm : int64_t {
  f2 = 0,         // F(2, 3): 16 products for 2 x 2 outputs, where the definition takes 36; rounds about as it does
  f4 = 1,         // F(4, 3): 36 for 4 x 4 outputs, where the definition takes 144; rounds more
  upsampled = 2,  // of the image with every pixel twice in both directions: F(2, 3), of whose 4 x 4 points those that
                  // are differences of twins vanish: 9 products for the 2 x 2 outputs of a pixel
};

struct ConvShape {
  int64_t pixels, points, outputs, step;  // of a tile, along one axis; `step` inputs to the next tile
};
constexpr ConvShape kConvShapes[] = {{4, 4, 2, 2}, {6, 6, 4, 4}, {3, 3, 2, 1}};

constexpr int64_t kConvPanel = 64;  // outputs of a panel of packed weights, [points][points][panels][inputs][panel]

// Channels are neighbours. out: [batch, height, width, outputs] of the outputs' own size, dense.
struct Conv3x3Args {
  ConvForm form;
  int64_t batch, height, width, inputs, outputs;  // of x
  const float* x;
  int64_t x_batch, x_row, x_pixel;  // strides
  const float* packed;              // of all panels from `panel` on
  int64_t panel, panels;            // the outputs of this call
  const float* bias;                // [outputs], or nullptr
  float* out;
};

struct Conv3x3Weight {
  ConvForm form;
  int64_t inputs, outputs;
  const float* weight;  // [outputs, inputs, 3, 3]
  int64_t stride[4];
  int64_t panel, panels;  // what is packed
  float* packed;
};

inline int64_t conv_panels(int64_t outputs) { return (outputs + kConvPanel - 1) / kConvPanel; }
inline int64_t conv_packed_size(ConvForm form, int64_t inputs, int64_t panels) {
  const int64_t points = kConvShapes[static_cast<int64_t>(form)].points;
  return points * points * panels * inputs * kConvPanel;
}

namespace cpu {
int64_t conv3x3_tasks(const Conv3x3Args& args);
void conv3x3(const Conv3x3Args& args, int64_t begin, int64_t end);
int64_t conv3x3_pack_tasks(const Conv3x3Weight& args);
void conv3x3_pack(const Conv3x3Weight& args, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace dk
