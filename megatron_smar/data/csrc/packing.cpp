// SPDX-License-Identifier: Apache-2.0
// Best-fit decreasing over two capacities. megatron_smar/data/packing.py documents it and checks its arguments.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

namespace py = pybind11;

namespace {

using Array = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// The packs that still have room. A tree over the packs' token rooms stores the largest tile room below each node, so
// that a search skips packs without room for tiles: O(log max_tokens) per sample, for any data.
class OpenPacks {
  public:
    explicit OpenPacks(std::int64_t max_tokens) : levels_(max_tokens + 1) {
        while (leaves_ <= static_cast<std::size_t>(max_tokens)) leaves_ *= 2;
        most_tiles_.assign(2 * leaves_, -1);
    }

    struct Pack {
        std::int32_t id;
        std::int64_t token_room;
        std::int64_t tile_room;
    };

    // Removes and returns the pack with the least token room that the sample fits into; among several, the pack with
    // the least tile room; among those, the pack that was put here last.
    std::optional<Pack> take(std::int64_t tokens, std::int64_t tiles) {
        std::size_t node = leaves_ + tokens;
        while (most_tiles_[node] < tiles) {
            while (node & 1) node /= 2;       // to the right of a right child is to the right of its parent
            if (node == 0) return std::nullopt;  // went past the root
            ++node;
        }
        while (node < leaves_) node = 2 * node + (most_tiles_[2 * node] < tiles);
        const auto room = static_cast<std::int64_t>(node - leaves_);
        auto &levels = levels_[room];
        const auto level = find(levels, tiles);
        const Pack pack{level->top, room, level->tile_room};
        level->top = below_[pack.id];
        if (level->top < 0) {
            levels.erase(level);
            refresh(room);
        }
        return pack;
    }

    void put(const Pack &pack) {
        auto &levels = levels_[pack.token_room];
        auto level = find(levels, pack.tile_room);
        if (level == levels.end() || level->tile_room != pack.tile_room) {
            if (levels.empty()) used_.push_back(pack.token_room);
            level = levels.insert(level, Level{pack.tile_room, -1});
            refresh(pack.token_room);
        }
        if (below_.size() <= static_cast<std::size_t>(pack.id)) below_.resize(pack.id + 1);
        below_[pack.id] = level->top;
        level->top = pack.id;
    }

    void clear() {
        for (const auto room : used_) {
            levels_[room].clear();
            refresh(room);
        }
        used_.clear();
    }

  private:
    // The packs with the same token room and tile room: a stack, linked through `below_`.
    struct Level {
        std::int64_t tile_room;
        std::int32_t top;
    };

    static std::vector<Level>::iterator find(std::vector<Level> &levels, std::int64_t tiles) {
        return std::lower_bound(levels.begin(), levels.end(), tiles,
                                [](const Level &level, std::int64_t value) { return level.tile_room < value; });
    }

    // Updates the tree with the largest tile room of a token room.
    void refresh(std::int64_t room) {
        const auto &levels = levels_[room];
        std::size_t node = leaves_ + room;
        std::int64_t most = levels.empty() ? -1 : levels.back().tile_room;
        while (most_tiles_[node] != most) {
            most_tiles_[node] = most;
            if (node == 1) return;
            most = std::max(most, most_tiles_[node ^ 1]);
            node /= 2;
        }
    }

    std::size_t leaves_ = 1;
    std::vector<std::int64_t> most_tiles_;    // by tree node; -1: no pack
    std::vector<std::vector<Level>> levels_;  // by token room, in ascending order of tile room
    std::vector<std::int32_t> below_;         // by pack: the next pack down its stack
    std::vector<std::int64_t> used_;          // token rooms that may have packs
};

// Sorts the indices 0 .. size - 1 by descending tokens, ties ascending: a radix sort, one byte per pass.
void sort_descending(const std::int64_t *tokens, std::int64_t size, std::int64_t max_tokens,
                     std::vector<std::uint32_t> &sorted, std::vector<std::uint32_t> &scratch) {
    sorted.resize(size);
    scratch.resize(size);
    std::iota(sorted.begin(), sorted.end(), 0u);
    for (int shift = 0; max_tokens >> shift; shift += 8) {
        std::array<std::uint32_t, 257> begins{};
        const auto digit = [&](std::uint32_t place) { return (max_tokens - tokens[place]) >> shift & 255; };
        for (std::uint32_t place = 0; place < size; ++place) ++begins[digit(place) + 1];
        std::partial_sum(begins.begin(), begins.end(), begins.begin());
        for (const auto place : sorted) scratch[begins[digit(place)]++] = place;
        sorted.swap(scratch);
    }
}

// Returns the pack of each sample; packs are numbered in the order in which they were opened.
std::vector<std::int32_t> assign(const std::int64_t *tokens, const std::int64_t *tiles, std::int64_t count,
                                 std::int64_t max_tokens, std::int64_t max_tiles, std::int64_t window) {
    std::vector<std::int32_t> pack_of(count);
    std::vector<std::uint32_t> sorted, scratch;
    OpenPacks open(max_tokens);
    std::int32_t packs = 0;
    for (std::int64_t begin = 0; begin < count; begin += window) {
        const auto size = std::min(window, count - begin);
        sort_descending(tokens + begin, size, max_tokens, sorted, scratch);
        const auto smallest = tokens[begin + sorted.back()];
        for (const auto place : sorted) {
            const auto index = begin + place;
            auto pack = open.take(tokens[index], tiles[index]);
            if (!pack) pack = OpenPacks::Pack{packs++, max_tokens, max_tiles};
            pack->token_room -= tokens[index];
            pack->tile_room -= tiles[index];
            pack_of[index] = pack->id;
            if (pack->token_room >= smallest) open.put(*pack);
        }
        open.clear();
    }
    return pack_of;
}

py::tuple pack(const Array &tokens, const Array &tiles, std::int64_t max_tokens, std::int64_t max_tiles,
               std::int64_t window) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    std::vector<std::int64_t> offsets{0};
    Array order(count);
    {
        const auto *token_data = tokens.data(), *tile_data = tiles.data();
        auto *order_data = order.mutable_data();
        py::gil_scoped_release released;
        auto pack_of = assign(token_data, tile_data, count, max_tokens, max_tiles, window);
        // Renumbers the packs by their first index, which is the order in which an ascending walk meets them.
        std::vector<std::int32_t> rank(count, -1);
        std::int32_t packs = 0;
        for (auto &pack : pack_of) {
            if (rank[pack] < 0) {
                rank[pack] = packs++;
                offsets.push_back(0);
            }
            pack = rank[pack];
            ++offsets[pack + 1];
        }
        for (std::int32_t i = 0; i < packs; ++i) offsets[i + 1] += offsets[i];
        auto next = offsets;
        for (std::int64_t index = 0; index < count; ++index) order_data[next[pack_of[index]]++] = index;
    }
    return py::make_tuple(order, Array(static_cast<py::ssize_t>(offsets.size()), offsets.data()));
}

// Built here in one pass: in Python, the garbage collector would traverse the growing lists again and again.
py::list lists(const Array &order, const Array &offsets) {
    const auto index = order.unchecked<1>();
    const auto bound = offsets.unchecked<1>();
    py::list packs(bound.size() - 1);
    for (py::ssize_t p = 0; p + 1 < bound.size(); ++p) {
        py::list pack(bound(p + 1) - bound(p));
        for (std::int64_t i = bound(p); i < bound(p + 1); ++i)
            PyList_SET_ITEM(pack.ptr(), i - bound(p), py::int_(index(i)).release().ptr());
        PyList_SET_ITEM(packs.ptr(), p, pack.release().ptr());
    }
    return packs;
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
    module.doc() = "Best-fit decreasing over two capacities; use megatron_smar.data.packing.";
    module.def("pack", &pack, py::arg("tokens"), py::arg("tiles"), py::arg("max_tokens"), py::arg("max_tiles"),
               py::arg("window"), "The samples pack by pack, [n], and the offset of each pack, [packs + 1].");
    module.def("lists", &lists, py::arg("order"), py::arg("offsets"), "The result of pack as one list per pack.");
}
