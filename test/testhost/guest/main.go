// Command guest runs in the test host. As /init of the initramfs it finds the disks, mounts them and hands over to
// systemd; started by systemd with the argument "serve" it runs what the test sends over a virtio port.
package main

import (
	"fmt"
	"os"
)

func main() {
	var err error
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		err = serve()
	} else {
		err = boot()
	}
	fmt.Println("testhost:", err)
	powerOff()
}
