// Package runtimetest is for tests of and with runtimes: one conformance suite that every runtime passes, and a fake
// runtime without walls that passes it too, as far as it can.
//
// A runtime's own test is five lines:
//
//	func TestConformance(t *testing.T) {
//		runtimetest.Run(t, runtimetest.Factory{
//			Isolation: spec.IsolationContainer,
//			New:       func(t *testing.T, dir string) runtime.Runtime { … },
//		})
//	}
package runtimetest
