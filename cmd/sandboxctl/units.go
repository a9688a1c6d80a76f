package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseBytes reads 512, 64k, 256m, 1.5g, 2t, also with b or iB at the end; the units are powers of 1024, as docker's.
func parseBytes(s string) (uint64, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := strings.ToLower(s[len(digits):])
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "b"), "i")
	shift := strings.Index("_kmgt", unit) * 10
	switch {
	case unit == "":
		shift = 0
	case shift < 10 || len(unit) != 1:
		return 0, fmt.Errorf("cannot use size %q: write a number and a unit, such as 256m or 1g", s)
	}
	f, err := strconv.ParseFloat(digits, 64)
	if err != nil || f < 0 || math.IsNaN(f) || f*float64(uint64(1)<<shift) >= math.MaxInt64 {
		return 0, fmt.Errorf("cannot use size %q: write a number and a unit, such as 256m or 1g", s)
	}
	return uint64(f * float64(uint64(1)<<shift)), nil
}

// parseCPUs reads 0.5, 2, 1.5 into thousandths.
func parseCPUs(s string) (uint32, error) {
	f, err := strconv.ParseFloat(s, 64)
	millis := math.Round(f * 1000)
	if err != nil || !(millis >= 1 && millis <= math.MaxUint32) {
		return 0, fmt.Errorf("cannot use --cpus %q: write a number of processors, such as 0.5 or 2", s)
	}
	return uint32(millis), nil
}

// parseMode reads permission bits, in octal.
func parseMode(s string) (uint32, error) {
	mode, err := strconv.ParseUint(s, 8, 12)
	if err != nil {
		return 0, fmt.Errorf("cannot use mode %q: write permission bits in octal, such as 1777", s)
	}
	return uint32(mode), nil
}

// parseLimit reads one side of an ulimit; -1 and unlimited mean without limit.
func parseLimit(s string) (uint64, error) {
	if s == "-1" || s == "unlimited" {
		return math.MaxUint64, nil
	}
	return strconv.ParseUint(s, 10, 64)
}
