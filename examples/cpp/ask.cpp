// Answers a question with a bundle of vz-edge and stock ONNX Runtime GenAI: no Python, nothing of vz-edge.
//
//   ask BUNDLE INPUTS [LONGEST_ANSWER]
//
// INPUTS is a folder with one .npy file for each named tensor (docs/bundle.md), as prepare.py writes them.

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_genai.h"

namespace {

struct Array {
  OgaElementType type;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

const std::map<std::string, OgaElementType> kTypes = {
    {"<f4", OgaElementType_float32}, {"<i4", OgaElementType_int32}, {"<i8", OgaElementType_int64}};

// What stands between `before` and the next `after` in a .npy file's header, which is a Python dict.
std::string Between(const std::string& text, const std::string& before, const std::string& after) {
  const auto begin = text.find(before);
  const auto end = begin == std::string::npos ? begin : text.find(after, begin + before.size());
  if (end == std::string::npos) throw std::runtime_error("no " + before + " in the header of a .npy file");
  return text.substr(begin + before.size(), end - begin - before.size());
}

// Version 1.0 of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, in C order.
Array ReadNpy(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  char start[10] = {};
  file.read(start, sizeof start);
  if (!file || std::string(start, 8) != std::string("\x93NUMPY\x01\x00", 8))
    throw std::runtime_error(path.string() + " is no .npy file of version 1.0");
  const auto length = static_cast<unsigned char>(start[8]) + 256 * static_cast<unsigned char>(start[9]);
  std::string header(length, '\0');
  file.read(header.data(), length);
  if (Between(header, "'fortran_order': ", ",") != "False")
    throw std::runtime_error(path.string() + " is in Fortran order; expected C order");

  const auto type = kTypes.find(Between(header, "'descr': '", "'"));
  if (type == kTypes.end()) throw std::runtime_error(path.string() + " is not of float32, int32 or int64");

  Array array{type->second, {}, {}};
  std::istringstream shape(Between(header, "'shape': (", ")"));
  int64_t size = 0;
  for (char comma = 0; shape >> size; shape >> comma) array.shape.push_back(size);
  array.data.assign(std::istreambuf_iterator<char>(file), {});
  return array;
}

void Ask(const std::string& bundle, const std::filesystem::path& folder, int longest_answer) {
  auto model = OgaModel::Create(bundle.c_str());
  std::map<std::string, Array> arrays;  // the tensors refer to their data
  auto inputs = OgaNamedTensors::Create();
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".npy") continue;
    const std::string name = entry.path().stem().string();
    Array& array = arrays[name] = ReadNpy(entry.path());
    inputs->Set(name.c_str(),
                *OgaTensor::Create(array.data.data(), array.shape.data(), array.shape.size(), array.type));
  }

  const auto ids = arrays.find("input_ids");
  if (ids == arrays.end())
    throw std::runtime_error(folder.string() + " has no input_ids.npy; expected what prepare.py writes");

  auto params = OgaGeneratorParams::Create(*model);
  // The KV cache is allocated for this many tokens.
  params->SetSearchOption("max_length", static_cast<double>(ids->second.shape.at(1) + longest_answer));
  auto generator = OgaGenerator::Create(*model, *params);
  generator->SetInputs(*inputs);
  auto tokenizer = OgaTokenizer::Create(*model);
  auto text = OgaTokenizerStream::Create(*tokenizer);
  while (!generator->IsDone()) {
    generator->GenerateNextToken();
    for (const int32_t token : generator->GetNextTokens()) std::cout << text->Decode(token) << std::flush;
  }
  std::cout << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: ask BUNDLE INPUTS [LONGEST_ANSWER]\n";
    return 2;
  }
  OgaHandle handle;  // shuts the library down at the end
  try {
    Ask(argv[1], argv[2], argc > 3 ? std::stoi(argv[3]) : 64);
  } catch (const std::exception& error) {
    std::cerr << "ask: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
