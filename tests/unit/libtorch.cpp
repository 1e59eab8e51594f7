// Runs an exported language model without Python: all positions at once, then one after the other
// with a cache.
#include <torch/script.h>

#include <fstream>

int main(int, char** argv) {
  torch::NoGradGuard no_grad;
  auto model = torch::jit::load(argv[1]);
  const int64_t length = std::stol(argv[2]), width = std::stol(argv[3]);
  const auto xs = torch::arange(length * width, torch::kFloat32).sin().view({1, length, width});

  const auto outputs = model.forward({xs, torch::full({1}, length)}).toTuple()->elements();
  const auto at_once = outputs[0].toTensor();
  const auto none = torch::zeros({0, 0, 0, 0});
  auto cache = none;
  std::vector<torch::Tensor> steps;
  for (int64_t i = 0; i < length; i++) {
    const auto mask = torch::ones({1, 1, 1}, torch::kBool);
    const auto chunk = model.get_method("forward_chunk")(
        {xs.slice(1, i, i + 1), i, -1, cache, none, mask});
    steps.push_back(chunk.toTuple()->elements()[0].toTensor());
    cache = chunk.toTuple()->elements()[1].toTensor();
  }

  const auto both = torch::cat({at_once, torch::cat(steps, 1)}).contiguous();
  std::ofstream(argv[4], std::ios::binary)
      .write(static_cast<const char*>(both.data_ptr()), both.nbytes());
}
