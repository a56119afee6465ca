#include "block_fusion/plan.h"

namespace convfirst::block_fusion {
namespace {

const char* name_of(DType dtype) { return dtype == DType::kHalf ? "float16" : "bfloat16"; }

const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kRelu: return "relu";
    case Activation::kSilu: return "silu";
    default: return "gelu";
  }
}

}  // namespace

const Table<Variant>& all_variants() {
  static const Table<Variant> rows = join<Variant>({sm90_variants, sm80_variants});
  return rows;
}

void check_path(const std::string& path) {
  convfirst::check_path(all_variants(), path);
}

std::string describe(const Problem& p) {
  std::ostringstream out;
  out << "C=" << p.channels << " hidden=" << p.hidden << " k=" << p.kernel_size << " group_width=" << p.group_width << " "
      << name_of(p.dtype) << " " << name_of(p.activation) << (p.has_norm ? " with norm" : " without norm") << ", " << p.batch
      << " x " << p.height << " x " << p.width;
  return out.str();
}

Fields fields(const Problem& p) {
  return {p.batch,       p.height,
          p.width,       p.channels,
          p.hidden,      p.kernel_size,
          p.group_width, static_cast<int>(p.dtype),
          static_cast<int>(p.activation), p.has_norm};
}

}  // namespace convfirst::block_fusion
