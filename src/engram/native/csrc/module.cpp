// The Python face of the kernels: plain functions over addresses and sizes. engram/native/__init__.py and native/rows.py check every
// argument before they call them; nothing here may be called with an address that was not checked there.
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "gated.h"
#include "gather.h"
#include "hash.h"
#include "read.h"
#include "rows.h"

namespace {

using engram::HashInput;
using engram::HashPlan;
using engram::Outcome;

constexpr const char* kPlan = "engram.HashPlan";

// Integers of a call, in order. False with an exception set if there are not exactly N of them.
template <size_t N>
bool read_integers(PyObject* const* args, Py_ssize_t count, std::array<int64_t, N>& out) {
  if (count != static_cast<Py_ssize_t>(N)) {
    PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %zd", count, static_cast<Py_ssize_t>(N));
    return false;
  }
  for (size_t i = 0; i < N; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

template <class T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(value));
}

// Runs fn while other Python threads run, and takes the lock back however fn ends.
template <class Fn>
auto without_gil(const Fn& fn) {
  struct Released {
    PyThreadState* state = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(state); }
  } released;
  return fn();
}

PyObject* result(const Outcome& outcome) {
  if (outcome.ok) return PyLong_FromLongLong(outcome.value);
  PyErr_Format(PyExc_IndexError, "%lld", static_cast<long long>(outcome.value));
  return nullptr;
}

void free_plan(PyObject* capsule) { delete static_cast<HashPlan*>(PyCapsule_GetPointer(capsule, kPlan)); }

PyObject* make_plan(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 10> a;
  if (!read_integers(args, count, a)) return nullptr;
  auto plan = std::make_unique<HashPlan>(
      engram::finished({address<const int64_t>(a[0]), a[1], address<const int64_t>(a[2]), address<const int64_t>(a[3]),
                        address<const double>(a[4]), address<const int64_t>(a[5]), a[6], a[7], a[8], a[9], 0, 0}));
  PyObject* capsule = PyCapsule_New(plan.get(), kPlan, free_plan);
  if (capsule) plan.release();
  return capsule;
}

const HashPlan* plan_of(PyObject* capsule) { return static_cast<const HashPlan*>(PyCapsule_GetPointer(capsule, kPlan)); }

HashInput input_of(const int64_t* a) {
  return {address<const int64_t>(a[0]), address<const uint8_t>(a[1]), address<const int64_t>(a[2]), a[3], a[4], a[5]};
}

PyObject* hash_ngrams(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 9> a;
  const HashPlan* plan = count > 0 ? plan_of(args[0]) : nullptr;
  if (PyErr_Occurred() || !read_integers(args + 1, count - 1, a)) return nullptr;
  const Outcome outcome = without_gil([&] {
    return engram::hash_ngrams(*plan, input_of(a.data()), address<int64_t>(a[6]), address<int32_t>(a[7]), a[8]);
  });
  return result(outcome);
}

// A C-contiguous array of eight-byte integers with so many dimensions.
class Array {
 public:
  Array(PyObject* object, int dims, int flags) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags) != 0) return;
    held_ = true;
    const bool integers = view_.itemsize == 8 && view_.format && (view_.format[0] == 'l' || view_.format[0] == 'q') && !view_.format[1];
    if (view_.ndim != dims || !integers) PyErr_Format(PyExc_ValueError, "expected an array of int64 with %d dimensions", dims);
  }
  ~Array() {
    if (held_) PyBuffer_Release(&view_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  int64_t* data() const { return static_cast<int64_t*>(view_.buf); }
  int64_t size(int dim) const { return view_.shape[dim]; }

 private:
  Py_buffer view_{};
  bool held_ = false;
};

// As hash_ngrams without past and padding, for arrays: addresses and sizes come from the arrays themselves, which costs less than asking
// for them from Python.
PyObject* hash_array(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "got %zd arguments, expected 4", count);
  const HashPlan* plan = plan_of(args[0]);
  if (!plan) return nullptr;
  const Array ids(args[1], 2, 0);
  if (PyErr_Occurred()) return nullptr;
  const Array out(args[2], 4, PyBUF_WRITABLE);
  if (PyErr_Occurred()) return nullptr;
  const int64_t threads = PyLong_AsLongLong(args[3]);
  if (PyErr_Occurred()) return nullptr;
  if (out.size(0) != plan->layers || out.size(1) != ids.size(0) || out.size(2) != ids.size(1) || out.size(3) != plan->orders * plan->heads) {
    PyErr_SetString(PyExc_ValueError, "hash_array: the shape of `out` does not fit");
    return nullptr;
  }
  const HashInput input{ids.data(), nullptr, nullptr, ids.size(0), ids.size(1), 0};
  const Outcome outcome = without_gil([&] { return engram::hash_ngrams(*plan, input, out.data(), nullptr, threads); });
  return result(outcome);
}

PyObject* find_verified(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 14> a;
  const HashPlan* plan = count > 0 ? plan_of(args[0]) : nullptr;
  if (PyErr_Occurred() || !read_integers(args + 1, count - 1, a)) return nullptr;
  const engram::VerifiedIndex index{address<const int64_t>(a[7]), address<const int64_t>(a[8]), a[9], address<const uint8_t>(a[10])};
  const Outcome outcome = without_gil([&] {
    return engram::find_verified(*plan, a[6], input_of(a.data()), index, a[11] != 0, address<int64_t>(a[12]), a[13]);
  });
  return result(outcome);
}

PyObject* build_buckets(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 5> a;
  if (!read_integers(args, count, a)) return nullptr;
  without_gil([&] {
    engram::build_buckets(address<const int64_t>(a[0]), address<const int32_t>(a[1]), a[2], address<int64_t>(a[3]), a[4]);
  });
  Py_RETURN_NONE;
}

PyObject* gather_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 10> a;
  if (!read_integers(args, count, a)) return nullptr;
  const engram::Rows rows{address<const uint8_t>(a[0]), address<const uint8_t>(a[1]), a[2], a[3], a[4],
                          static_cast<engram::RowFormat>(a[5])};
  const int64_t bad = without_gil([&] {
    return engram::gather_rows(rows, address<const int64_t>(a[6]), a[7], address<uint8_t>(a[8]), a[9]);
  });
  return PyLong_FromLongLong(bad);
}

PyObject* touch_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 7> a;
  if (!read_integers(args, count, a)) return nullptr;
  const int64_t warm = without_gil([&] {
    return engram::touch_rows(address<const uint8_t>(a[0]), a[1], a[2], address<const int64_t>(a[3]), a[4], a[5], a[6] != 0);
  });
  return PyLong_FromLongLong(warm);
}

PyObject* scan_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 6> a;
  if (!read_integers(args, count, a)) return nullptr;
  const int64_t sum = without_gil([&] {
    return engram::scan_rows(address<const uint8_t>(a[0]), a[1], a[2], address<const int64_t>(a[3]), a[4], a[5]);
  });
  return PyLong_FromLongLong(sum);
}

// A double whose bits came as an integer.
double real(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PyObject* read_stream(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 25> a;
  if (!read_integers(args, count, a)) return nullptr;
  const engram::ReadStream task{a[0], a[1], a[2], address<const float>(a[3]), address<const float>(a[4]), a[5],
                                address<const float>(a[6]), a[7], address<const float>(a[8]), address<const float>(a[9]), real(a[10]),
                                a[11] != 0, address<float>(a[12]), a[13], address<const float>(a[14]), a[15], a[16],
                                address<const float>(a[17]), real(a[18]), address<float>(a[19]), a[20], address<const float>(a[21]),
                                a[22], a[23], a[24]};
  without_gil([&] { engram::read_stream(task); });
  Py_RETURN_NONE;
}

// The first 17 integers of both passes, in the order of engram/native/gated.py.
engram::Gated gated_of(const int64_t* a) {
  return {a[0], a[1], a[2], a[3], a[4], {address<uint8_t>(a[5]), a[6] != 0}, {address<uint8_t>(a[7]), a[8] != 0}, address<const float>(a[9]),
          address<const float* const>(a[10]), real(a[11]), a[12] != 0, address<const float>(a[13]), a[14], a[15], real(a[16])};
}

PyObject* gated_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 20> a;
  if (!read_integers(args, count, a)) return nullptr;
  const engram::Gated task = gated_of(a.data());
  without_gil([&] {
    engram::gated_forward(task, {address<uint8_t>(a[17]), task.streams.half}, address<engram::Kept>(a[18]), a[19]);
  });
  Py_RETURN_NONE;
}

PyObject* gated_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 24> a;
  if (!read_integers(args, count, a)) return nullptr;
  const engram::Gated task = gated_of(a.data());
  const engram::GatedGradients gradients{{address<uint8_t>(a[18]), task.streams.half},
                                         {address<uint8_t>(a[19]), task.projected.half},
                                         {address<uint8_t>(a[20]), task.streams.half},
                                         address<float* const>(a[21]),
                                         address<float>(a[22])};
  without_gil([&] { engram::gated_backward(task, address<const engram::Kept>(a[17]), gradients, a[23]); });
  Py_RETURN_NONE;
}

PyObject* group_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 6> a;
  if (!read_integers(args, count, a)) return nullptr;
  const int64_t groups = without_gil([&] {
    return engram::group_rows(address<const int64_t>(a[0]), a[1], a[2], address<int64_t>(a[3]), address<int64_t>(a[4]),
                              address<int64_t>(a[5]));
  });
  return PyLong_FromLongLong(groups);
}

engram::RowGroups groups_of(const int64_t* a) {
  return {address<const int64_t>(a[0]), address<const int64_t>(a[1]), address<const int64_t>(a[2]), a[3]};
}

PyObject* sum_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 9> a;
  if (!read_integers(args, count, a)) return nullptr;
  without_gil([&] {
    engram::sum_rows(groups_of(a.data()), address<const uint8_t>(a[4]), static_cast<engram::RowType>(a[5]), a[6], address<float>(a[7]), a[8]);
  });
  Py_RETURN_NONE;
}

PyObject* claim_slots(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 8> a;
  if (!read_integers(args, count, a)) return nullptr;
  const int64_t used = without_gil([&] {
    return engram::claim_slots(address<const int64_t>(a[0]), a[1], address<int32_t>(a[2]), a[3], address<int64_t>(a[4]), a[5], a[6],
                               address<int64_t>(a[7]));
  });
  return PyLong_FromLongLong(used);
}

PyObject* step_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<int64_t, 16> a;
  if (!read_integers(args, count, a)) return nullptr;
  const double* n = address<const double>(a[12]);
  const auto as_float = [](double value) { return static_cast<float>(value); };
  const engram::StepNumbers numbers{as_float(n[0]), as_float(n[2]), as_float(n[3]), as_float(n[4]),
                                      as_float(n[5]), as_float(1 - n[1]), as_float(1 - n[2])};
  const engram::RowStep step{address<uint8_t>(a[4]), a[5], static_cast<engram::RowType>(a[6]), address<const uint8_t>(a[7]),
                             static_cast<engram::RowState>(a[8]), address<const int64_t>(a[9]), address<float>(a[10]),
                             address<float>(a[11]), numbers, a[13] != 0,
                             static_cast<uint64_t>(a[14])};
  without_gil([&] { engram::step_rows(groups_of(a.data()), step, a[15]); });
  Py_RETURN_NONE;
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(engram::instruction_set()); }

PyObject* limit_instruction_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool known = engram::limit_instruction_set(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(known);
}

// Python knows nothing of C++ exceptions: one that got through would end the process.
template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyObject* guarded(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    return Function(self, args, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef fast(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<Function>)), METH_FASTCALL, doc};
}

PyMethodDef kMethods[] = {
    fast<make_plan>("make_plan", "lookup, vocab, multipliers, primes, inverses, offsets, layers, orders, heads, raw_pad -> plan"),
    fast<hash_ngrams>("hash_ngrams", "plan, ids, mask, history, batch, length, history_length, out, tags, threads"),
    fast<hash_array>("hash_array", "plan, ids, out, threads; two NumPy arrays"),
    fast<find_verified>("find_verified",
                        "plan, ids, mask, history, batch, length, history_length, layer, row_ids, buckets, bucket_mask, order_used, "
                        "longest_only, slots, threads -> positions found"),
    fast<build_buckets>("build_buckets", "row_ids, tags, stored, buckets, bucket_mask"),
    fast<gather_rows>("gather_rows",
                      "data, scales, rows, dim, row_bytes, format, row_ids, n, out, threads -> -1 or where a row number is out of range"),
    fast<touch_rows>("touch_rows", "data, rows, row_bytes, row_ids, n, threads, count -> rows that were in memory before"),
    fast<scan_rows>("scan_rows", "data, rows, row_bytes, row_ids, n, threads -> exclusive or of all words"),
    fast<read_stream>("read_stream",
                      "batch, length, dim, value, key, projected_stride, stream, stream_stride, norm_key, norm_query, norm_eps, "
                      "signed_sqrt, out, out_stride, conv, kernel, dilation, norm_conv, conv_eps, normed, normed_stride, past, "
                      "past_length, past_batch_stride, past_stride; eps as the bits of a double"),
    fast<gated_forward>("gated_forward",
                        "batch, length, branches, dim, keys, projected, projected_half, streams, streams_half, mask, norms, norm_eps, "
                        "signed_sqrt, taps, kernel, dilation, conv_eps, out, kept, threads; norms is an array of addresses"),
    fast<gated_backward>("gated_backward",
                         "as gated_forward up to conv_eps, kept, to_out, to_projected, to_streams, to_norms, to_taps, threads"),
    fast<group_rows>("group_rows", "row_ids, n, table_rows, rows, starts, order -> groups, or -1 - where a row number is out of range"),
    fast<sum_rows>("sum_rows", "rows, starts, order, count, gradients, type, dim, out, threads"),
    fast<claim_slots>("claim_slots", "row_ids, n, slot_of_row, table_rows, row_of_slot, capacity, used, slots -> used, or -1 - where"),
    fast<step_rows>("step_rows",
                    "rows, starts, order, count, table, dim, type, gradients, state, slots, first, second, numbers (six doubles), "
                    "stochastic, seed, threads"),
    {"instruction_set", instruction_set, METH_NOARGS, "avx512, avx2 or portable"},
    {"limit_instruction_set", limit_instruction_set, METH_O, "Use a smaller instruction set ('' for the best); False if unknown."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "engram.native._core", "Kernels of engram.", 0, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__core() { return PyModuleDef_Init(&kModule); }
