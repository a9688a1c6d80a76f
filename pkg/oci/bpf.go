package oci

import (
	"encoding/binary"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// maxInstructions is the kernel's BPF_MAXINSNS.
	maxInstructions = 4096
	// instructionSize is that of struct sock_filter: code, jt, jf, k.
	instructionSize = 8
	// maxJump is how far a conditional jump reaches; an unconditional one has 32 bits.
	maxJump = 255
)

const (
	opLoad = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	opAnd  = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opJump = unix.BPF_JMP | unix.BPF_JA
	opJEQ  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opJGE  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	opJGT  = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	opRet  = unix.BPF_RET | unix.BPF_K
)

// label is a place in a program that jumps lead to. Jumps lead forward only: classic BPF has no others.
type label int

// fall is the label of the next instruction.
const fall label = -1

type instruction struct {
	code   uint16
	k      uint32
	jt, jf label
}

// program is a filter while it is written.
type program struct {
	code []instruction
	// Where each label lies.
	labels []int
	err    error
}

func (p *program) newLabel() label {
	p.labels = append(p.labels, -1)
	return label(len(p.labels) - 1)
}

func (p *program) place(l label) { p.labels[l] = len(p.code) }

func (p *program) emit(code uint16, k uint32) {
	p.code = append(p.code, instruction{code, k, fall, fall})
}

// jump goes to yes if the accumulator compares to k, else to no.
func (p *program) jump(code uint16, k uint32, yes, no label) {
	p.code = append(p.code, instruction{code, k, yes, no})
}

// check writes the whole filter.
func (p *program) check(rules map[uint32][]rule, fallback uint32) {
	native, normal, x32 := p.newLabel(), p.newLabel(), p.newLabel()
	p.emit(opLoad, dataArch)
	p.jump(opJEQ, unix.AUDIT_ARCH_X86_64, native, fall)
	p.emit(opRet, badArchRet)
	p.place(native)
	p.emit(opLoad, dataNr)
	p.jump(opJGE, x32Bit, x32, normal)
	p.place(x32)
	p.emit(opRet, retNoSys)
	p.place(normal)
	p.search(segmentsOf(rules, fallback))
}

// search writes a binary search for the accumulator, a system call number, over segments.
func (p *program) search(segments []segment) {
	if len(segments) == 1 {
		p.leaf(segments[0])
		return
	}
	half := len(segments) / 2
	left := program{}
	left.search(segments[:half])
	distance := len(left.code)
	if distance <= maxJump {
		right := p.newLabel()
		p.jump(opJGE, segments[half].first, right, fall)
		p.append(&left)
		p.place(right)
	} else {
		// Too far for a conditional jump: an unconditional one is stepped over.
		below := p.newLabel()
		p.jump(opJGE, segments[half].first, fall, below)
		p.emit(opJump, uint32(distance))
		p.place(below)
		p.append(&left)
	}
	p.search(segments[half:])
}

// append puts a program that was written apart behind p.
func (p *program) append(o *program) {
	base := label(len(p.labels))
	for _, at := range o.labels {
		p.labels = append(p.labels, at+len(p.code))
	}
	for _, in := range o.code {
		if in.jt != fall {
			in.jt += base
		}
		if in.jf != fall {
			in.jf += base
		}
		p.code = append(p.code, in)
	}
	if p.err == nil {
		p.err = o.err
	}
}

// leaf writes what happens to the calls of one segment. It ends in a return on every way.
func (p *program) leaf(s segment) {
	for _, r := range s.rules {
		fails := p.newLabel()
		for _, c := range r.conditions {
			holds := p.newLabel()
			p.condition(c, holds, fails)
			p.place(holds)
		}
		p.emit(opRet, r.ret)
		p.place(fails)
	}
	p.emit(opRet, s.fallback)
}

// condition compares a 64-bit argument, unsigned, in two halves.
func (p *program) condition(c specs.LinuxSeccompArg, holds, fails label) {
	low := dataArgs + argSize*uint32(c.Index)
	high := low + argHigh
	word := func(v uint64) (uint32, uint32) { return uint32(v >> 32), uint32(v) }

	switch c.Op {
	case specs.OpEqualTo:
		p.equal(low, high, ^uint64(0), c.Value, holds, fails)
	case specs.OpNotEqual:
		p.equal(low, high, ^uint64(0), c.Value, fails, holds)
	case specs.OpMaskedEqual:
		p.equal(low, high, c.Value, c.ValueTwo, holds, fails)
	case specs.OpGreaterEqual, specs.OpLessThan, specs.OpGreaterThan, specs.OpLessEqual:
		code := uint16(opJGE)
		if c.Op == specs.OpGreaterThan || c.Op == specs.OpLessEqual {
			code = opJGT
		}
		if c.Op == specs.OpLessThan || c.Op == specs.OpLessEqual {
			holds, fails = fails, holds // not >=, not >
		}
		h, l := word(c.Value)
		same := p.newLabel()
		p.emit(opLoad, high)
		p.jump(opJGT, h, holds, fall)
		p.jump(opJEQ, h, same, fails)
		p.place(same)
		p.emit(opLoad, low)
		p.jump(code, l, holds, fails)
	default:
		p.err = fmt.Errorf("operator %q is unknown", c.Op)
	}
}

// equal goes to yes if argument & mask == value.
func (p *program) equal(low, high uint32, mask, value uint64, yes, no label) {
	same := p.newLabel()
	p.half(high, uint32(mask>>32), uint32(value>>32), same, no)
	p.place(same)
	p.half(low, uint32(mask), uint32(value), yes, no)
}

func (p *program) half(offset, mask, value uint32, yes, no label) {
	p.emit(opLoad, offset)
	if mask != ^uint32(0) {
		p.emit(opAnd, mask)
	}
	p.jump(opJEQ, value, yes, no)
}

// assemble resolves the labels.
func (p *program) assemble() ([]byte, error) {
	if p.err != nil {
		return nil, p.err
	}
	if len(p.code) > maxInstructions {
		return nil, fmt.Errorf("it takes %d instructions, and the kernel allows %d", len(p.code), maxInstructions)
	}
	out := make([]byte, 0, len(p.code)*instructionSize)
	for i, in := range p.code {
		jt, err := p.distance(i, in.jt)
		if err != nil {
			return nil, err
		}
		jf, err := p.distance(i, in.jf)
		if err != nil {
			return nil, err
		}
		out = binary.LittleEndian.AppendUint16(out, in.code)
		out = append(out, jt, jf)
		out = binary.LittleEndian.AppendUint32(out, in.k)
	}
	return out, nil
}

// distance is how many instructions are stepped over from the one at i to l.
func (p *program) distance(i int, l label) (uint8, error) {
	if l == fall {
		return 0, nil
	}
	d := p.labels[l] - i - 1
	if d < 0 || d > maxJump {
		return 0, fmt.Errorf("a jump of %d instructions does not fit", d)
	}
	return uint8(d), nil
}
