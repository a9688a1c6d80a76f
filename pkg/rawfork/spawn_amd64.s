#include "textflag.h"

// func cloneJob(number, first, second uintptr, j *job, run uintptr) (pid uintptr, errno unix.Errno)
TEXT ·cloneJob(SB), NOSPLIT, $0-56
	MOVQ	first+8(FP), DI
	MOVQ	second+16(FP), SI
	XORL	DX, DX // of clone(2): where pids are stored, the thread's area
	XORL	R10, R10
	XORL	R8, R8
	MOVQ	j+24(FP), R12 // this and the next the kernel keeps, for the child too
	MOVQ	run+32(FP), R13
	MOVQ	number+0(FP), AX
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	CMPQ	AX, $0xfffffffffffff001
	JCC	failed
	MOVQ	AX, pid+40(FP)
	MOVQ	$0, errno+48(FP)
	RET
failed:
	NEGQ	AX
	MOVQ	$-1, pid+40(FP)
	MOVQ	AX, errno+48(FP)
	RET
child:
	// SP is the top of the child's stack. By the compiler's convention the argument is in AX, 0 in X15, the goroutine in R14: the
	// parent's, of which nothing that comes reads anything. Not through the wrapper of runJob that "CALL ·runJob(SB)" would
	// mean: in a build with the race detector that one calls the detector.
	ANDQ	$~15, SP
	MOVQ	R12, AX
	XORPS	X15, X15
	MOVQ	(TLS), R14
	CALL	R13
	INT	$3
