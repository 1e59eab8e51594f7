// Runs an exported language model where no Python is: a row at once, then position after position behind a cache.
#include <torch/script.h>

#include <fstream>

int main(int, char** argv) {
  torch::NoGradGuard no_grad;
  auto model = torch::jit::load(argv[1]);
  const int64_t length = std::stol(argv[2]), width = std::stol(argv[3]);
  const auto xs = torch::arange(length * width, torch::kFloat32).sin().view({1, length, width});

  const auto at_once = model.forward({xs, torch::full({1}, length)}).toTuple()->elements()[0].toTensor();
  const auto none = torch::zeros({0, 0, 0, 0});
  auto cache = none;
  std::vector<torch::Tensor> steps;
  for (int64_t i = 0; i < length; i++) {
    const auto seen = torch::ones({1, 1, 1}, torch::kBool);
    const auto found = model.get_method("forward_chunk")({xs.slice(1, i, i + 1), i, -1, cache, none, seen}).toTuple()->elements();
    steps.push_back(found[0].toTensor());
    cache = found[1].toTensor();
  }

  const auto both = torch::cat({at_once, torch::cat(steps, 1)}).contiguous();
  std::ofstream(argv[4], std::ios::binary).write(static_cast<const char*>(both.data_ptr()), both.nbytes());
}
