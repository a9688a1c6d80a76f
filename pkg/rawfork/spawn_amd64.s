#include "textflag.h"

#define SYS_clone3 435

// func cloneJob(args *cloneArgs, size uintptr, j *job, run uintptr) (pid uintptr, errno unix.Errno)
TEXT ·cloneJob(SB), NOSPLIT, $0-48
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVQ	j+16(FP), R12 // this and the next the kernel keeps, for the child too
	MOVQ	run+24(FP), R13
	MOVL	$SYS_clone3, AX
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	CMPQ	AX, $0xfffffffffffff001
	JCC	failed
	MOVQ	AX, pid+32(FP)
	MOVQ	$0, errno+40(FP)
	RET
failed:
	NEGQ	AX
	MOVQ	$-1, pid+32(FP)
	MOVQ	AX, errno+40(FP)
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
