// Calls of ops from Python where nothing is special: exact tensors on the CPU, all floating ones of one type, none of them
// expanded or asking for a gradient, no mode or transform in force. They reach the dispatcher in a fraction of the time that
// torch.ops and the checks of fastcam/ops take.
//
// Every other call is answered with NotImplemented, and so is every error: the general way in Python then makes the call again
// and says what is wrong. That is sound because ops change nothing.
#pragma once

#include <Python.h>

namespace fastcam {

// One method an op, named as it, of the op's arguments by position.
PyMethodDef* plain_calls();

}  // namespace fastcam
