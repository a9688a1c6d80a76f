'use strict'
// A workload's whole life from JavaScript: the same steps, and the same lines printed, as examples/go-client.
//
//   buf build --as-file-descriptor-set -o sandboxd.binpb      (or scripts/proto.sh descriptors sandboxd.binpb)
//   npm ci && node client.js --descriptors sandboxd.binpb --isolation vm --image docker.io/library/busybox:latest
//   ... --address tcp://10.0.0.1:7443 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key

const fs = require('node:fs')
const { parseArgs } = require('node:util')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')
const protobuf = require('protobufjs')

const { values: flags } = parseArgs({
  options: {
    address: { type: 'string', default: 'unix:///run/sandboxd/sandboxd.sock' },
    descriptors: { type: 'string', default: 'sandboxd.binpb' },
    'tls-ca': { type: 'string' },
    'tls-cert': { type: 'string' },
    'tls-key': { type: 'string' },
    image: { type: 'string', default: 'docker.io/library/busybox:latest' },
    isolation: { type: 'string', default: 'auto' },
    label: { type: 'string', default: 'example=node' }
  }
})

// Every call has a deadline: nothing else bounds it.
const callMilliseconds = 3 * 60 * 1000
const deadline = () => new Date(Date.now() + callMilliseconds)

// The client is made of the API's descriptors. protobufjs cannot parse the options in protovalidate's .proto file itself; of
// a descriptor set it reads what it needs; a map it takes for what it is on the wire, a list of keys and values,
// and names stay as the .proto files write them.
const api = grpc.loadPackageDefinition(loader.loadFileDescriptorSetFromBuffer(
  fs.readFileSync(flags.descriptors), { longs: String, enums: String, defaults: true, oneofs: true })).sandboxd.v1

// On the same host the kernel says who calls; over TCP both sides show certificates.
function connect () {
  const options = { 'grpc.max_receive_message_length': 64 << 20 }
  if (!flags.address.startsWith('tcp://')) {
    return new api.WorkloadService(flags.address, grpc.credentials.createInsecure(), options)
  }
  const [ca, key, cert] = ['tls-ca', 'tls-key', 'tls-cert'].map((name) => fs.readFileSync(flags[name]))
  return new api.WorkloadService('dns:' + flags.address.slice('tcp://'.length), grpc.credentials.createSsl(ca, key, cert), options)
}

const workloads = connect()

// unary makes a promise of a call with one answer.
const unary = (method, request) => new Promise((resolve, reject) => {
  workloads[method](request, { deadline: deadline() }, (err, answer) => err ? reject(err) : resolve(answer))
})

// exec runs a further process: start first, then its input; started, output and exit come back.
function exec (id, command, input) {
  return new Promise((resolve, reject) => {
    const stream = workloads.exec({ deadline: deadline() })
    const stdout = []
    const stderr = []
    let exit
    stream.on('data', (r) => {
      if (r.response === 'stdout') stdout.push(r.stdout)
      if (r.response === 'stderr') stderr.push(r.stderr)
      if (r.response === 'exit') exit = r.exit
    })
    stream.on('error', reject)
    stream.on('end', () => {
      if (exit) resolve({ code: exit.code, stdout: Buffer.concat(stdout).toString(), stderr: Buffer.concat(stderr).toString() })
      else reject(new Error('exec ended without an exit'))
    })
    stream.write({ start: { id, command, stdin: true } })
    stream.write({ stdin: Buffer.from(input) })
    stream.write({ close_stdin: {} })
    stream.end()
  })
}

// logs is everything the workload's own process wrote.
function logs (id) {
  return new Promise((resolve, reject) => {
    const pieces = []
    const stream = workloads.streamLogs({ id }, { deadline: deadline() })
    stream.on('data', (piece) => pieces.push(piece.data))
    stream.on('error', reject)
    stream.on('end', () => resolve(Buffer.concat(pieces).toString()))
  })
}

// What every gRPC error may carry: google/rpc/status.proto and error_details.proto, as far as it is needed here.
const rpc = protobuf.parse(`syntax = "proto3"; package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`, { keepCase: true }).root

// details is the google.rpc.ErrorInfo of an error of the daemon.
function details (err) {
  for (const raw of err.metadata.get('grpc-status-details-bin')) {
    for (const any of rpc.lookupType('google.rpc.Status').decode(raw).details) {
      if (any.type_url !== 'type.googleapis.com/google.rpc.ErrorInfo') continue
      const info = rpc.lookupType('google.rpc.ErrorInfo').decode(any.value)
      if (info.domain === 'sandboxd') return info
    }
  }
  throw new Error('an error without details: ' + err.message)
}

async function refused (method, request) {
  let answer
  try {
    answer = await unary(method, request)
  } catch (err) {
    const info = details(err)
    console.log(`refused: code ${err.code}, reason ${info.reason}, field ${JSON.stringify(info.metadata.field ?? '')}`)
    return
  }
  throw new Error('a mistake was not refused: ' + JSON.stringify(answer))
}

async function main () {
  const [key, value] = flags.label.split('=')
  const { workload } = await unary('createWorkload', {
    labels: [{ key, value }],
    spec: {
      image: flags.image,
      isolation: 'ISOLATION_' + flags.isolation.toUpperCase(),
      process: {
        entrypoint: ['sh', '-c'],
        command: ['echo begun; while [ ! -e /tmp/end ]; do sleep 0.1; done; echo ended; exit 3']
      },
      resources: { memory_bytes: 128 * 1024 * 1024 }
    }
  })
  const { id } = workload
  let deleted = false
  try {
    console.log('created:', workload.status.isolation)
    const started = await unary('startWorkload', { id })
    console.log('started:', started.workload.status.state)
    const second = await exec(id, ['sh', '-c', 'cat; echo to stderr >&2; touch /tmp/end; exit 4'], 'through stdin\n')
    console.log(`exec: code ${second.code}, stdout ${JSON.stringify(second.stdout)}, stderr ${JSON.stringify(second.stderr)}`)
    const waited = await unary('waitWorkload', { id })
    console.log('waited: code', waited.workload.status.exit_code)
    console.log('output:', JSON.stringify(await logs(id)))
    await unary('deleteWorkload', { id })
    deleted = true
    console.log('deleted')
  } finally {
    if (!deleted) await unary('deleteWorkload', { id, force: true })
  }
  await refused('getWorkload', { id })
  await refused('createWorkload', { spec: { image: flags.image } }) // no isolation
}

main().catch((err) => {
  console.error('node-client:', err.message)
  process.exitCode = 1
}).finally(() => workloads.close())
