// Reading and updating the touched rows of a table, as PyTorch ops.
#pragma once

#include <optional>

#include "torch_ops.h"
#include "update_rows.h"

namespace {

Schedule schedule_of(const Tensor& schedule, const Tensor& last_step, std::int64_t step, double eps) {
  STD_TORCH_CHECK(step < schedule.size(0), "the schedule has a row for every step so far");
  return {read<double>(schedule), read<std::int32_t>(last_step), step, eps};
}

// f(Value{}, Grad{}) for gradients in the dtype of the table or in that of the update.
template <class F>
void for_gradients(const Tensor& values, const Tensor& grads, const F& f) {
  for_element(values.scalar_type(), [&](auto value) {
    using Acc = Accumulator<decltype(value)>;
    if (grads.scalar_type() == values.scalar_type()) return f(value, value);
    STD_TORCH_CHECK((std::is_same_v<Acc, float>) && grads.scalar_type() == ScalarType::Float,
                    "gradients have the dtype of the table or float32");
    f(value, Acc{});
  });
}

Tensor catch_up_rows_op(const Tensor& values, const Tensor& schedule, const Tensor& step, const Tensor& last_step,
                        const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& exp_avg_sq, double eps,
                        const Tensor& rows) {
  const bool wide = values.scalar_type() == ScalarType::Double;
  const std::int64_t count = rows.size(0), d = values.size(1);
  Tensor out = torch::stable::new_empty(values, {count, d}, wide ? ScalarType::Double : ScalarType::Float);
  const Schedule debts = schedule_of(schedule, last_step, *read<std::int64_t>(step), eps);
  for_element(values.scalar_type(), [&](auto value) {
    using Value = decltype(value);
    using Acc = Accumulator<Value>;
    catch_up_rows(read<Value>(values), exp_avg ? read<Acc>(*exp_avg) : nullptr,
                  exp_avg_sq ? read<Acc>(*exp_avg_sq) : nullptr, debts, read<std::int64_t>(rows), count, d,
                  write<Acc>(out), TorchThreads{});
  });
  return out;
}

void adamw_rows_op(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& last_step,
                   const Tensor& schedule, const Tensor& rows, const Tensor& grads, std::int64_t step, double lr,
                   double beta1, double beta2, double eps, double weight_decay, std::int64_t seed) {
  const Schedule debts = schedule_of(schedule, last_step, step - 1, eps);
  for_gradients(values, grads, [&](auto value, auto grad) {
    using Value = decltype(value);
    using Acc = Accumulator<Value>;
    adamw_rows(write<Value>(values), write<Acc>(exp_avg), write<Acc>(exp_avg_sq), write<std::int32_t>(last_step), debts,
               AdamW{lr, beta1, beta2, eps, weight_decay}, seed, read<std::int64_t>(rows), read<decltype(grad)>(grads),
               rows.size(0), values.size(1), TorchThreads{});
  });
}

void adagrad_rows_op(const Tensor& values, const Tensor& row_sum, const Tensor& last_step, const Tensor& schedule,
                     const Tensor& rows, const Tensor& grads, std::int64_t step, double lr, double eps,
                     double weight_decay, std::int64_t seed) {
  const Schedule debts = schedule_of(schedule, last_step, step - 1, eps);
  for_gradients(values, grads, [&](auto value, auto grad) {
    using Value = decltype(value);
    using Acc = Accumulator<Value>;
    adagrad_rows(write<Value>(values), write<Acc>(row_sum), write<std::int32_t>(last_step), debts,
                 Adagrad{lr, eps, weight_decay}, seed, read<std::int64_t>(rows), read<decltype(grad)>(grads),
                 rows.size(0), values.size(1), TorchThreads{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ultramem_native, m) {
  m.def(
      "catch_up_rows(Tensor values, Tensor schedule, Tensor step, Tensor last_step, Tensor? exp_avg, "
      "Tensor? exp_avg_sq, float eps, Tensor rows) -> Tensor");
  m.def(
      "adamw_rows_(Tensor(a!) values, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) last_step, "
      "Tensor schedule, Tensor rows, Tensor grads, int step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int seed) -> ()");
  m.def(
      "adagrad_rows_(Tensor(a!) values, Tensor(b!) row_sum, Tensor(c!) last_step, Tensor schedule, Tensor rows, "
      "Tensor grads, int step, float lr, float eps, float weight_decay, int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ultramem_native, CPU, m) {
  m.impl("catch_up_rows", TORCH_BOX(&catch_up_rows_op));
  m.impl("adamw_rows_", TORCH_BOX(&adamw_rows_op));
  m.impl("adagrad_rows_", TORCH_BOX(&adagrad_rows_op));
}
