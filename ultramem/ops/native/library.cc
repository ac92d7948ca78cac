// The library: every kernel as a PyTorch op.
#include "lookup_ops.h"
#include "permute_ops.h"
#include "select_ops.h"
#include "update_ops.h"
