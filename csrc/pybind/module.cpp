// indexcache_ext._C: the ops for arrays of any library, without torch; build info and the support table.
#include "csrc/pybind/arrays.h"
#include "indexcache/backend.h"

namespace indexcache::pybind {
namespace {

using namespace py::literals;

py::object json(const std::string& text) { return py::module_::import("json").attr("loads")(text); }

/// Runs an op without the GIL: everything it needs has been converted.
template <class Op>
void run(Op op) {
  const py::gil_scoped_release release;
  op();
}

py::object result_or(const Call& call, const py::object& out) { return out.is_none() ? call.result(0) : out; }
py::tuple pair_or(const Call& call, const py::object& out, const py::object& lse) {
  return out.is_none() ? call.pair() : py::make_tuple(out, lse);
}

void bind_quantise(py::module_& m) {
  m.def(
      "quantize_index_q",
      [](py::object q, py::object weights, py::object cos_sin, py::object positions, double scale, bool interleaved,
         bool hadamard, bool ue8m0, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_float("q", q), vw = c.in("weights", weights);
        const auto vc = c.maybe("cos_sin", cos_sin), vp = c.maybe("positions", positions);
        run([&] { quantize_index_q(c.ctx, vq, vw, vc, vp, scale, {interleaved, hadamard, ue8m0}); });
        return c.pair();
      },
      "q"_a, "weights"_a, "cos_sin"_a, "positions"_a, py::kw_only(), "scale"_a, "interleaved"_a = false,
      "hadamard"_a = false, "ue8m0"_a = false, "stream"_a = 0);
  m.def(
      "quantize_index_k",
      [](py::object k, py::object norm_weight, py::object norm_bias, py::object cos_sin, py::object positions,
         double eps, bool interleaved, bool hadamard, bool ue8m0, uint64_t stream) {
        Call c(stream);
        const auto vk = c.in_float("k", k);
        const auto vw = c.maybe("norm_weight", norm_weight), vb = c.maybe("norm_bias", norm_bias);
        const auto vc = c.maybe("cos_sin", cos_sin), vp = c.maybe("positions", positions);
        run([&] { quantize_index_k(c.ctx, vk, vw, vb, vc, vp, eps, {interleaved, hadamard, ue8m0}); });
        return c.pair();
      },
      "k"_a, "norm_weight"_a, "norm_bias"_a, "cos_sin"_a, "positions"_a, py::kw_only(), "eps"_a = 1e-6,
      "interleaved"_a = false, "hadamard"_a = false, "ue8m0"_a = false, "stream"_a = 0);
  m.def(
      "store_index_k",
      [](py::object k, py::object norm_weight, py::object norm_bias, py::object cos_sin, py::object positions,
         py::object slots, py::object index_k_cache, double eps, bool interleaved, bool hadamard, bool ue8m0,
         uint64_t stream) {
        Call c(stream);
        const auto vk = c.in_float("k", k);
        const auto vw = c.maybe("norm_weight", norm_weight), vb = c.maybe("norm_bias", norm_bias);
        const auto vc = c.maybe("cos_sin", cos_sin), vp = c.maybe("positions", positions);
        const auto vs = c.in("slots", slots), cache = c.writable("index_k_cache", index_k_cache);
        run([&] { store_index_k(c.ctx, vk, vw, vb, vc, vp, vs, cache, eps, {interleaved, hadamard, ue8m0}); });
      },
      "k"_a, "norm_weight"_a, "norm_bias"_a, "cos_sin"_a, "positions"_a, "slots"_a, "index_k_cache"_a, py::kw_only(),
      "eps"_a = 1e-6, "interleaved"_a = false, "hadamard"_a = false, "ue8m0"_a = false, "stream"_a = 0);
  m.def(
      "gather_index_k",
      [](py::object index_k_cache, py::object slots, uint64_t stream) {
        Call c(stream);
        const auto cache = c.in("index_k_cache", index_k_cache), vs = c.in("slots", slots);
        run([&] { gather_index_k(c.ctx, cache, vs); });
        return c.pair();
      },
      "index_k_cache"_a, "slots"_a, py::kw_only(), "stream"_a = 0);
  m.def(
      "store_latent_kv",
      [](py::object kv, py::object slots, py::object kv_cache, uint64_t stream) {
        Call c(stream);
        const auto vk = c.in_float("kv", kv), vs = c.in("slots", slots), cache = c.writable("kv_cache", kv_cache);
        run([&] { store_latent_kv(c.ctx, vk, vs, cache); });
      },
      "kv"_a, "slots"_a, "kv_cache"_a, py::kw_only(), "stream"_a = 0);
  m.def(
      "gather_latent_kv",
      [](py::object kv_cache, py::object slots, uint64_t stream) {
        Call c(stream);
        const auto cache = c.in("kv_cache", kv_cache), vs = c.in("slots", slots);
        run([&] { gather_latent_kv(c.ctx, cache, vs); });
        return c.result(0);
      },
      "kv_cache"_a, "slots"_a, py::kw_only(), "stream"_a = 0);
}

void bind_indexer(py::module_& m) {
  m.def(
      "indexer_logits",
      [](py::object q, py::object k, py::object k_scale, py::object weights, py::object starts, py::object ends,
         py::object out, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_e4m3("q", q), vk = c.in_e4m3("k", k), vs = c.in("k_scale", k_scale);
        const auto vw = c.in("weights", weights), v0 = c.in("starts", starts), v1 = c.in("ends", ends);
        const auto vo = c.maybe_writable("out", out);
        run([&] { indexer_logits(c.ctx, vq, vk, vs, vw, v0, v1, vo); });
        return result_or(c, out);
      },
      "q"_a, "k"_a, "k_scale"_a, "weights"_a, "starts"_a, "ends"_a, py::kw_only(), "out"_a = py::none(),
      "stream"_a = 0);
  m.def(
      "indexer_logits_paged",
      [](py::object q, py::object index_k_cache, py::object weights, py::object context_lens, py::object block_table,
         int64_t max_context_len, py::object out, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_e4m3("q", q), cache = c.in("index_k_cache", index_k_cache), vw = c.in("weights", weights);
        const auto vl = c.in("context_lens", context_lens), vt = c.in("block_table", block_table);
        const auto vo = c.maybe_writable("out", out);
        run([&] { indexer_logits_paged(c.ctx, vq, cache, vw, vl, vt, max_context_len, vo); });
        return result_or(c, out);
      },
      "q"_a, "index_k_cache"_a, "weights"_a, "context_lens"_a, "block_table"_a, "max_context_len"_a, py::kw_only(),
      "out"_a = py::none(), "stream"_a = 0);
  m.def(
      "topk",
      [](py::object logits, py::object starts, py::object ends, int64_t k, py::object out, uint64_t stream) {
        Call c(stream);
        const auto vl = c.in_float("logits", logits), v0 = c.in("starts", starts), v1 = c.in("ends", ends);
        const auto vo = c.maybe_writable("out", out);
        run([&] { topk(c.ctx, vl, v0, v1, k, vo); });
        return result_or(c, out);
      },
      "logits"_a, "starts"_a, "ends"_a, "k"_a, py::kw_only(), "out"_a = py::none(), "stream"_a = 0);
  m.def(
      "topk_to_slots",
      [](py::object logits, py::object starts, py::object ends, int64_t k, py::object block_table, py::object requests,
         int64_t page_size, py::object out, uint64_t stream) {
        Call c(stream);
        const auto vl = c.in_float("logits", logits), v0 = c.in("starts", starts), v1 = c.in("ends", ends);
        const auto vt = c.in("block_table", block_table), vr = c.in("requests", requests);
        const auto vo = c.maybe_writable("out", out);
        run([&] { topk_to_slots(c.ctx, vl, v0, v1, k, vt, vr, page_size, vo); });
        return result_or(c, out);
      },
      "logits"_a, "starts"_a, "ends"_a, "k"_a, "block_table"_a, "requests"_a, "page_size"_a, py::kw_only(),
      "out"_a = py::none(), "stream"_a = 0);
  m.def(
      "topk_reads",
      [](py::object logits, py::object starts, py::object ends, int64_t k, uint64_t stream) {
        Call c(stream);
        const auto vl = c.in_float("logits", logits), v0 = c.in("starts", starts), v1 = c.in("ends", ends);
        run([&] { topk_reads(c.ctx, vl, v0, v1, k); });
        return c.result(0);
      },
      "logits"_a, "starts"_a, "ends"_a, "k"_a, py::kw_only(), "stream"_a = 0);
  m.def(
      "indexer_topk",
      [](py::object q, py::object k, py::object k_scale, py::object weights, py::object starts, py::object ends,
         int64_t topk, py::object out, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_e4m3("q", q), vk = c.in_e4m3("k", k), vs = c.in("k_scale", k_scale);
        const auto vw = c.in("weights", weights), v0 = c.in("starts", starts), v1 = c.in("ends", ends);
        const auto vo = c.maybe_writable("out", out);
        run([&] { indexer_topk(c.ctx, vq, vk, vs, vw, v0, v1, topk, vo); });
        return result_or(c, out);
      },
      "q"_a, "k"_a, "k_scale"_a, "weights"_a, "starts"_a, "ends"_a, "topk"_a, py::kw_only(), "out"_a = py::none(),
      "stream"_a = 0);
  m.def(
      "indexer_topk_paged",
      [](py::object q, py::object index_k_cache, py::object weights, py::object context_lens, py::object block_table,
         int64_t topk, py::object out, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_e4m3("q", q), cache = c.in("index_k_cache", index_k_cache), vw = c.in("weights", weights);
        const auto vl = c.in("context_lens", context_lens), vt = c.in("block_table", block_table);
        const auto vo = c.maybe_writable("out", out);
        run([&] { indexer_topk_paged(c.ctx, vq, cache, vw, vl, vt, topk, vo); });
        return result_or(c, out);
      },
      "q"_a, "index_k_cache"_a, "weights"_a, "context_lens"_a, "block_table"_a, "topk"_a, py::kw_only(),
      "out"_a = py::none(), "stream"_a = 0);
  m.def(
      "to_slots",
      [](py::object indices, py::object block_table, py::object requests, int64_t page_size, py::object out,
         uint64_t stream) {
        Call c(stream);
        const auto vi = c.in("indices", indices), vt = c.in("block_table", block_table);
        const auto vr = c.in("requests", requests);
        const auto vo = c.maybe_writable("out", out);
        run([&] { to_slots(c.ctx, vi, vt, vr, page_size, vo); });
        return result_or(c, out);
      },
      "indices"_a, "block_table"_a, "requests"_a, "page_size"_a, py::kw_only(), "out"_a = py::none(), "stream"_a = 0);
}

void bind_attention(py::module_& m) {
  m.def(
      "sparse_mla",
      [](py::object q, py::object kv, py::object indices, double sm_scale, int64_t d_v, py::object sink,
         py::object lengths, py::object out, py::object lse, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_float("q", q), vk = c.in_float("kv", kv), vi = c.in("indices", indices);
        const auto vs = c.maybe("sink", sink), vl = c.maybe("lengths", lengths);
        const AttentionOut vo = c.attention_out(out, lse);
        run([&] { sparse_mla(c.ctx, vq, vk, vi, sm_scale, d_v, vs, vl, vo); });
        return pair_or(c, out, lse);
      },
      "q"_a, "kv"_a, "indices"_a, "sm_scale"_a, "d_v"_a = 512, "sink"_a = py::none(), "lengths"_a = py::none(),
      py::kw_only(), "out"_a = py::none(), "lse"_a = py::none(), "stream"_a = 0);
  m.def(
      "sparse_mla_paged",
      [](py::object q, py::object kv_cache, py::object slots, double sm_scale, py::object sink, py::object lengths,
         py::object out, py::object lse, uint64_t stream) {
        Call c(stream);
        const auto vq = c.in_float("q", q), cache = c.in("kv_cache", kv_cache), vi = c.in("slots", slots);
        const auto vs = c.maybe("sink", sink), vl = c.maybe("lengths", lengths);
        const AttentionOut vo = c.attention_out(out, lse);
        run([&] { sparse_mla_paged(c.ctx, vq, cache, vi, sm_scale, vs, vl, vo); });
        return pair_or(c, out, lse);
      },
      "q"_a, "kv_cache"_a, "slots"_a, "sm_scale"_a, "sink"_a = py::none(), "lengths"_a = py::none(), py::kw_only(),
      "out"_a = py::none(), "lse"_a = py::none(), "stream"_a = 0);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "The ops of indexcache_ext on NumPy and DLPack arrays, without torch; build info and support table.";
  py::register_exception<Error>(m, "Error", PyExc_ValueError);
  py::class_<DeviceArray>(m, "DeviceArray", "A CUDA result that exports itself through DLPack.")
      .def("__dlpack__", &DeviceArray::dlpack, py::kw_only(), "stream"_a = py::none())
      .def("__dlpack_device__", &DeviceArray::dlpack_device);
  bind_quantise(m);
  bind_indexer(m);
  bind_attention(m);
  m.def("build_info", [] { return json(build_info()); });
  m.def("capabilities", [] { return json(capabilities_json()); });
}

}  // namespace indexcache::pybind
