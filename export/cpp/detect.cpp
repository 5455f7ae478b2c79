// Detects objects with a file written by `yoloxkd export`: detect MODEL.onnx IMAGE [least score, 0.25]
// Prints JSON: size of the image, and detections (box x1 y1 x2 y2 in px of the image, score, label, name), best first; of a
// file that gives masks each has its mask too, COCO's uncompressed run lengths.
#include <onnxruntime_cxx_api.h>

#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using nlohmann::json;

struct Image {
    int width, height;
    std::vector<uint8_t> rgb;  // height rows of width pixels
};

struct Detection {
    std::array<float, 4> box;
    float score;
    int64_t label;
    std::vector<float> cells = {};  // probabilities of the mask, rows of the cells that the box is divided into
};

struct Settings {
    std::vector<std::string> names;
    int height, width;
    std::array<int, 3> pad;
    bool nms, masks;
    float conf, iou;
    size_t max_det;
    size_t pairs_per_level;  // 0: of each location the best class; else every class, so many pairs of each level
    size_t per_cell;         // locations of a cell; 0: they lie in no cells and are one level
    std::vector<int> strides;
    json head;  // of a file of raw outputs: its tensors, and how they are decoded
};

// How a JPEG is to be turned, by EXIF's tag 274: 1 (not at all) to 8; 1 where it does not say.
static int orientation(const std::vector<uint8_t>& file) {
    auto big = [&](size_t at) { return at + 2 <= file.size() ? file[at] << 8 | file[at + 1] : 0; };
    if (big(0) != 0xFFD8) return 1;
    for (size_t at = 2; big(at) >= 0xFFC0 && big(at) != 0xFFDA; at += 2 + big(at + 2)) {
        size_t tiff = at + 10;  // behind the marker, the length and "Exif", with two zeros
        if (big(at) != 0xFFE1 || big(at + 4) != ('E' << 8 | 'x') || tiff + 8 > file.size()) continue;
        bool little = file[tiff] == 'I';
        auto number = [&](size_t place, int bytes) {
            size_t value = 0;
            for (int i = 0; i < bytes && place + bytes <= file.size(); ++i)
                value = value << 8 | file[place + (little ? bytes - 1 - i : i)];
            return value;
        };
        size_t entries = tiff + number(tiff + 4, 4);
        for (size_t i = 0; i < number(entries, 2); ++i)
            if (number(entries + 2 + 12 * i, 2) == 274) return int(number(entries + 2 + 12 * i + 8, 2));
        return 1;
    }
    return 1;
}

// The image upright: orientations from 5 on are turned by a quarter, 2, 4, 5 and 7 are mirrored.
static Image upright(const Image& image, int turn) {
    if (turn < 2 || turn > 8) return image;
    bool quarter = turn > 4;
    Image out{quarter ? image.height : image.width, quarter ? image.width : image.height, image.rgb};
    for (int y = 0; y < out.height; ++y)
        for (int x = 0; x < out.width; ++x) {
            int column = quarter ? y : x, row = quarter ? x : y;
            if (turn == 2 || turn == 3 || turn == 7 || turn == 8) column = image.width - 1 - column;
            if (turn == 3 || turn == 4 || turn == 6 || turn == 7) row = image.height - 1 - row;
            std::copy_n(&image.rgb[(size_t(row) * image.width + column) * 3], 3,
                        &out.rgb[(size_t(y) * out.width + x) * 3]);
        }
    return out;
}

static Image read_image(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    std::vector<uint8_t> file{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
    int width, height, channels;
    uint8_t* pixels = stbi_load_from_memory(file.data(), int(file.size()), &width, &height, &channels, 3);
    if (!pixels) throw std::runtime_error(path + " is not an image that can be read: " + stbi_failure_reason());
    Image image{width, height, std::vector<uint8_t>(pixels, pixels + size_t(width) * height * 3)};
    stbi_image_free(pixels);
    return upright(image, orientation(file));
}

static Settings read_settings(const Ort::Session& session, const std::string& path, float conf) {
    Ort::AllocatorWithDefaultOptions allocator;
    Ort::ModelMetadata metadata = session.GetModelMetadata();
    auto get = [&](const char* key, json otherwise = json()) {
        Ort::AllocatedStringPtr text = metadata.LookupCustomMetadataMapAllocated(key, allocator);
        if (!text && !otherwise.is_null()) return otherwise;
        if (!text) throw std::runtime_error(path + " has no metadata '" + key + "': `yoloxkd export` did not write it");
        return json::parse(text.get());
    };
    Settings s{get("names"),   get("input_size")[0], get("input_size")[1], get("pad_value"), get("nms"),
               get("masks", false),
               get("conf"),    get("iou"),           get("max_det")};
    json pairs = get("pairs_per_level", 0);  // not there in files of an older version
    s.pairs_per_level = pairs.is_null() ? 0 : pairs.get<size_t>();
    s.per_cell = get("predictions_per_cell", 1);
    s.strides = get("strides").get<std::vector<int>>();
    if (get("head_maps", 0).is_object()) s.head = get("head_maps");
    if (s.nms && conf < s.conf)
        throw std::runtime_error(path + " holds its own NMS, which drops scores below " + std::to_string(s.conf));
    s.conf = conf;
    return s;
}

// Bilinear, pixel centres at half: where in the source an output pixel lies, and how much of the next it takes.
struct Step {
    int first, second;
    float part;
};

static std::vector<Step> steps(int from, int to) {
    std::vector<Step> out(to);
    for (int i = 0; i < to; ++i) {
        float at = std::clamp((i + 0.5f) * from / to - 0.5f, 0.0f, float(from - 1));
        int first = int(at);
        out[i] = {first, std::min(first + 1, from - 1), at - first};
    }
    return out;
}

// The picture fitted into the input at the top left -> planes R, G, B of 0..255; returns the scale.
static float letterbox(const Image& image, const Settings& s, std::vector<float>& planes) {
    double scale = std::min(double(s.height) / image.height, double(s.width) / image.width);
    int width = std::max(1, int(image.width * scale)), height = std::max(1, int(image.height * scale));
    size_t area = size_t(s.height) * s.width;
    planes.resize(3 * area);
    for (int c = 0; c < 3; ++c) std::fill_n(planes.begin() + c * area, area, float(s.pad[c]));
    std::vector<Step> columns = steps(image.width, width), rows = steps(image.height, height);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c) {
                auto at = [&](int row, int column) {
                    return float(image.rgb[(size_t(row) * image.width + column) * 3 + c]);
                };
                const Step &h = columns[x], &v = rows[y];
                float upper = at(v.first, h.first) * (1 - h.part) + at(v.first, h.second) * h.part;
                float lower = at(v.second, h.first) * (1 - h.part) + at(v.second, h.second) * h.part;
                planes[c * area + size_t(y) * s.width + x] = std::round(upper * (1 - v.part) + lower * v.part);
            }
    return float(scale);
}

static float overlap(const std::array<float, 4>& a, const std::array<float, 4>& b) {
    float w = std::min(a[2], b[2]) - std::max(a[0], b[0]), h = std::min(a[3], b[3]) - std::max(a[1], b[1]);
    float both = std::max(w, 0.0f) * std::max(h, 0.0f);
    float either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both;
    return both / std::max(either, 1e-9f);
}

static bool better(const Detection& a, const Detection& b) { return a.score > b.score; }

// How many of the locations each feature level has.
static std::vector<size_t> level_sizes(size_t locations, const Settings& s) {
    if (s.per_cell == 0) return {locations};
    std::vector<size_t> sizes;
    size_t sum = 0;
    for (int stride : s.strides) {
        size_t rows = (s.height + stride - 1) / stride, columns = (s.width + stride - 1) / stride;
        sizes.push_back(rows * columns * s.per_cell);
        sum += sizes.back();
    }
    if (sum != locations) throw std::runtime_error("the file has not the locations that its metadata promises");
    return sizes;
}

// What goes into the suppression: of each location the best class, or every class and the best pairs of each level.
static std::vector<Detection> choose(const float* boxes, const float* scores, size_t locations, size_t classes,
                                     const Settings& s) {
    std::vector<Detection> found;
    auto add = [&](size_t i, size_t label) {
        float score = scores[i * classes + label];
        if (score >= s.conf)
            found.push_back({{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]}, score, int64_t(label)});
    };
    if (s.pairs_per_level == 0) {
        for (size_t i = 0; i < locations; ++i) {
            const float* row = scores + i * classes;
            add(i, std::max_element(row, row + classes) - row);
        }
        return found;
    }
    size_t location = 0;
    for (size_t size : level_sizes(locations, s)) {
        size_t before = found.size();
        for (size_t end = location + size; location < end; ++location)
            for (size_t label = 0; label < classes; ++label) add(location, label);
        std::stable_sort(found.begin() + before, found.end(), better);
        found.resize(std::min(found.size(), before + s.pairs_per_level));
    }
    return found;
}

// Of overlapping boxes of one class the best.
static std::vector<Detection> suppress(std::vector<Detection> found, const Settings& s) {
    std::vector<Detection> kept;
    std::stable_sort(found.begin(), found.end(), better);
    for (const Detection& d : found) {
        bool covered = std::any_of(kept.begin(), kept.end(), [&](const Detection& k) {
            return k.label == d.label && overlap(k.box, d.box) > s.iou;
        });
        if (!covered) kept.push_back(d);
        if (kept.size() == s.max_det) break;
    }
    return kept;
}

static float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// A box code around a location -> x1 y1 x2 y2 px.
static std::array<float, 4> box_of(std::vector<float> code, float x, float y, const json& anchor, float unit,
                                   const json& head) {
    std::string kind = head["box_code"];
    if (kind == "distances" || kind == "distributions") {
        size_t bins = head["bins"].is_null() ? 0 : head["bins"].get<size_t>();
        for (size_t side = 0; bins && side < 4; ++side) {  // mean of a distribution over 0 .. bins - 1
            auto first = code.begin() + side * bins;
            float largest = *std::max_element(first, first + bins), sum = 0, mean = 0;
            for (size_t i = 0; i < bins; ++i) {
                float share = std::exp(first[i] - largest);
                sum += share;
                mean += share * i;
            }
            code[side] = mean / sum;
        }
        return {x - code[0] * unit, y - code[1] * unit, x + code[2] * unit, y + code[3] * unit};
    }
    float center_x, center_y, width, height;
    if (kind == "cells") {
        center_x = x + (code[0] - 0.5f) * unit, center_y = y + (code[1] - 0.5f) * unit;
        width = std::exp(code[2]) * unit, height = std::exp(code[3]) * unit;
    } else {
        std::array<float, 4> a = anchor.get<std::array<float, 4>>();
        float limit = head["largest_log"], w = a[2] - a[0], h = a[3] - a[1];
        for (size_t i = 0; i < 4; ++i) code[i] *= head["deviations"][i].get<float>();
        center_x = x + (a[0] + a[2]) / 2 + code[0] * w, center_y = y + (a[1] + a[3]) / 2 + code[1] * h;
        width = std::exp(std::clamp(code[2], -limit, limit)) * w;
        height = std::exp(std::clamp(code[3], -limit, limit)) * h;
    }
    return {center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2};
}

// Runs a file of raw outputs: boxes (A, 4) px of the input and scores (A, K) of all locations.
static void decode(Ort::Session& session, Ort::Value& input, const Settings& s, std::vector<float>& boxes,
                   std::vector<float>& scores) {
    const json& head = s.head;
    size_t classes = s.names.size(), channels = 4 * (head["bins"].is_null() ? 1 : head["bins"].get<size_t>());
    bool strides = head["step"] == "stride", product = head["score"] != "class", root = head["score"] == "root";
    std::vector<std::string> tensors;
    for (const json& level : head["levels"]) {
        std::vector<std::string> wanted{level["classes"].get<std::string>(), level["boxes"].get<std::string>()};
        if (product) wanted.push_back(level["quality"].get<std::string>());
        tensors.insert(tensors.end(), wanted.begin(), wanted.end());
    }
    std::vector<const char*> names;
    for (const std::string& name : tensors) names.push_back(name.c_str());
    const char* inputs[] = {"images"};
    std::vector<Ort::Value> out = session.Run({}, inputs, &input, 1, names.data(), names.size());
    size_t next = 0;
    for (const json& level : head["levels"]) {
        const json& anchors = level["anchors"];
        size_t n = std::max<size_t>(anchors.size(), 1), stride = level["stride"];
        size_t h = (s.height + stride - 1) / stride, w = (s.width + stride - 1) / stride;
        float down = strides ? stride : s.height / h, right = strides ? stride : s.width / w;
        float offset = head["offset"], unit = level["unit"];
        auto tensor = [&](size_t of_each) {
            std::vector<int64_t> shape{1, int64_t(n * of_each), int64_t(h), int64_t(w)};
            if (out[next].GetTensorTypeAndShapeInfo().GetShape() != shape)
                throw std::runtime_error(std::string(names[next]) + " has not the shape that the metadata promises");
            return out[next++].GetTensorData<float>();
        };
        const float *logits = tensor(classes), *codes = tensor(channels), *quality = product ? tensor(1) : nullptr;
        for (size_t cell = 0; cell < h * w; ++cell)
            for (size_t k = 0; k < n; ++k) {
                std::vector<float> code(channels);
                for (size_t i = 0; i < channels; ++i) code[i] = codes[(k * channels + i) * h * w + cell];
                float x = (cell % w + offset) * right, y = (cell / w + offset) * down;
                for (float v : box_of(code, x, y, anchors.empty() ? json() : anchors[k], unit, head)) boxes.push_back(v);
                float factor = quality ? sigmoid(quality[k * h * w + cell]) : 1;
                for (size_t label = 0; label < classes; ++label) {
                    float score = sigmoid(logits[(k * classes + label) * h * w + cell]) * factor;
                    scores.push_back(root ? std::sqrt(score) : score);
                }
            }
    }
}

static std::vector<Detection> detect(Ort::Session& session, const Settings& s, std::vector<float>& planes) {
    std::array<int64_t, 4> shape{1, 3, s.height, s.width};
    Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::Value input = Ort::Value::CreateTensor<float>(memory, planes.data(), planes.size(), shape.data(), shape.size());
    const char* inputs[] = {"images"};
    if (!s.head.is_null()) {
        std::vector<float> decoded_boxes, decoded_scores;
        decode(session, input, s, decoded_boxes, decoded_scores);
        size_t classes = s.names.size();
        return suppress(choose(decoded_boxes.data(), decoded_scores.data(), decoded_boxes.size() / 4, classes, s), s);
    }
    const char* outputs[] = {"boxes", "scores", "labels", "counts", "masks"};
    std::vector<Ort::Value> out = session.Run({}, inputs, &input, 1, outputs, s.masks ? 5 : s.nms ? 4 : 2);
    const float *boxes = out[0].GetTensorData<float>(), *scores = out[1].GetTensorData<float>();
    if (!s.nms) {
        std::vector<int64_t> dims = out[1].GetTensorTypeAndShapeInfo().GetShape();
        return suppress(choose(boxes, scores, dims[1], dims[2], s), s);
    }
    std::vector<Detection> found;
    size_t area = 0;
    if (s.masks) {
        std::vector<int64_t> dims = out[4].GetTensorTypeAndShapeInfo().GetShape();
        area = size_t(dims[2] * dims[3]);
    }
    for (int64_t i = 0; i < *out[3].GetTensorData<int64_t>() && scores[i] >= s.conf; ++i) {
        found.push_back({{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]}, scores[i],
                         out[2].GetTensorData<int64_t>()[i]});
        if (!s.masks) continue;
        const float* cells = out[4].GetTensorData<float>() + i * area;
        found.back().cells.assign(cells, cells + area);
    }
    return found;
}

// Of each pixel the first of the two cells it is read from, and how much of the next: bilinear, at the pixel's center.
static std::vector<std::pair<int, double>> cells_of_pixels(double low, double high, int pixels, int cells) {
    std::vector<std::pair<int, double>> out(pixels);
    for (int i = 0; i < pixels; ++i) {
        double at = (i + 0.5 - low) / std::max(high - low, 1e-9) * cells - 0.5;
        at = std::clamp(at, -2.0, cells + 1.0);  // farther away there is nothing to read
        out[i] = {int(std::floor(at)), at - std::floor(at)};
    }
    return out;
}

// The mask of a box in px of the image as COCO's run lengths: down the columns, first the pixels outside.
static json run_lengths(const Detection& d, float scale, int height, int width) {
    int side = int(std::lround(std::sqrt(double(d.cells.size()))));
    auto rows = cells_of_pixels(d.box[1] / scale, d.box[3] / scale, height, side);
    auto columns = cells_of_pixels(d.box[0] / scale, d.box[2] / scale, width, side);
    auto cell = [&](int row, int column) {
        bool there = row >= 0 && row < side && column >= 0 && column < side;
        return there ? double(d.cells[size_t(row) * side + column]) : 0.0;
    };
    std::vector<int> counts{0};
    bool inside = false;
    for (auto [column, right] : columns)
        for (auto [row, down] : rows) {
            double upper = cell(row, column) * (1 - right) + cell(row, column + 1) * right;
            double lower = cell(row + 1, column) * (1 - right) + cell(row + 1, column + 1) * right;
            if ((upper * (1 - down) + lower * down >= 0.5) != inside) {
                inside = !inside;
                counts.push_back(0);
            }
            ++counts.back();
        }
    return {{"size", {height, width}}, {"counts", counts}};
}

int main(int argc, char** argv) try {
    if (argc < 3) throw std::runtime_error("usage: detect MODEL.onnx IMAGE [least score]");
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "detect");
    Ort::Session session(env, std::string(argv[1]).c_str(), Ort::SessionOptions{});
    Settings settings = read_settings(session, argv[1], argc > 3 ? std::stof(argv[3]) : 0.25f);
    Image image = read_image(argv[2]);
    std::vector<float> planes;
    float scale = letterbox(image, settings, planes);
    json detections = json::array();
    for (const Detection& d : detect(session, settings, planes)) {
        float right = float(image.width), below = float(image.height);
        detections.push_back({{"box",
                               {std::clamp(d.box[0] / scale, 0.0f, right), std::clamp(d.box[1] / scale, 0.0f, below),
                                std::clamp(d.box[2] / scale, 0.0f, right), std::clamp(d.box[3] / scale, 0.0f, below)}},
                              {"score", d.score},
                              {"label", d.label},
                              {"name", settings.names.at(d.label)}});
        if (settings.masks) detections.back()["mask"] = run_lengths(d, scale, image.height, image.width);
    }
    json result = {{"image", argv[2]}, {"height", image.height}, {"width", image.width}, {"detections", detections}};
    std::cout << result.dump(2) << "\n";
    return 0;
} catch (const std::exception& error) {
    std::cerr << "detect: " << error.what() << "\n";
    return 1;
}
