package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// bytesValue is a flag's size: a number of bytes, or one with a unit of 1024: 512m, 4g.
type bytesValue int64

var byteUnits = []struct {
	suffix string
	bytes  int64
}{{"t", 1 << 40}, {"g", 1 << 30}, {"m", 1 << 20}, {"k", 1 << 10}}

func (b *bytesValue) Set(s string) error {
	digits, unit := strings.ToLower(s), int64(1)
	for _, u := range byteUnits {
		if cut, ok := strings.CutSuffix(digits, u.suffix); ok {
			digits, unit = cut, u.bytes
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return fmt.Errorf("%q is no size: use a number of bytes, or 512m, 4g", s)
	}
	*b = bytesValue(n * unit)
	return nil
}

func (b *bytesValue) String() string {
	for _, u := range byteUnits {
		if n := int64(*b); n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(*b), 10)
}

func (*bytesValue) Type() string { return "size" }
