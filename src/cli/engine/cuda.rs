//! The engine on a CUDA device.

use anyhow::anyhow;
use polylora_engine::{
    LoraConfig,
    adapter::{LoraLimits, ModuleId, PackedDtype, Projection, load::module_shape},
    backend::cuda::{CudaBackend, CudaOptions, LoadError, MemoryUse, devices},
    decoder::DecoderConfig,
};

use super::{BuiltEngine, DeviceFacts, EngineInputs, HostMemory, StepLimits};
use crate::config::{Device, MemoryBudget};

/// Sequences at once, unless set.
const RUNNING_REQUESTS: usize = 256;
/// Tokens of a step, unless set.
const CHUNKED_PREFILL: usize = 2048;
/// Of those, prompt tokens of a step that also decodes, unless set.
const MIXED_PREFILL: usize = 1024;
/// Part of the memory for weights, KV cache and adapters, unless set.
const MEMORY_FRACTION: f64 = 0.85;
/// The device's buffers are made for this rank at least.
const MIN_BUFFER_RANK: u32 = 64;
/// Largest rank, unless it is set or inferred from the adapters of the start. Buffers for it take some megabytes.
const MAX_LORA_RANK: u32 = 256;
/// Address space for adapters on the host, where the machine's memory is not known.
const HOST_BYTES: u64 = 64 << 30;
/// Adapters of rank [`RESERVE_RANK`] on every projection that the host keeps memory ready for, unless set: what may come at once. Memory that nobody used
/// since the machine's boot made the first tokens of an adapter wait 0.1 to 0.4 s on some machines.
const RESERVE_ADAPTERS: usize = 96;
const RESERVE_RANK: usize = 16;
/// Of the machine's memory.
const MOST_RESERVE: u64 = 16;

/// Whether the model goes to a CUDA device: `auto` takes one if there is one, and says why not if there is none.
pub(super) fn is_chosen(device: Device) -> anyhow::Result<bool> {
    match device {
        Device::Cpu => Ok(false),
        Device::Cuda => Ok(devices().map(|_| true)?),
        Device::Auto => match devices() {
            Ok(_) => Ok(true),
            Err(reason) => {
                tracing::info!("running on the CPU: {reason}");
                Ok(false)
            }
        },
    }
}

pub(super) fn start(mut inputs: EngineInputs<'_>) -> anyhow::Result<BuiltEngine> {
    // The device's buffers are made for a largest rank: the registry refuses what is above.
    if let Some(lora) = &mut inputs.lora {
        lora.max_lora_rank.get_or_insert(MAX_LORA_RANK);
    }
    let (settings, lora) = (inputs.settings, &inputs.lora);
    let limits = StepLimits::of(settings, RUNNING_REQUESTS, CHUNKED_PREFILL, MIXED_PREFILL);
    let (mem_fraction, shared_bytes) = match settings.memory {
        None => (MEMORY_FRACTION, None),
        // The driver keeps some for itself.
        Some(MemoryBudget::Fraction(fraction)) => (fraction.min(0.99), None),
        Some(MemoryBudget::Bytes(bytes)) => (MEMORY_FRACTION, Some(usize::try_from(bytes)?)),
    };
    let host_bytes = HostMemory::read().total.unwrap_or(HOST_BYTES);
    let options = CudaOptions {
        mem_fraction,
        shared_bytes,
        kv_cache: None,
        block_size: settings.block_size,
        max_batch_tokens: limits.tokens,
        max_context: inputs.context_length.unwrap_or(usize::MAX),
        adapter_bytes: if lora.is_some() { usize::MAX } else { 0 },
        host_bytes: if lora.is_some() { usize::try_from(host_bytes)? } else { 0 },
        host_reserve_bytes: match lora {
            Some(lora) => host_reserve_bytes(lora, &inputs.decoder, host_bytes),
            None => 0,
        },
        max_adapters_per_batch: lora.as_ref().map_or(1, |lora| lora.max_loras_per_batch),
        max_lora_rank: lora
            .as_ref()
            .and_then(|lora| lora.max_lora_rank)
            .map_or(1, |rank| rank.max(MIN_BUFFER_RANK)) as usize,
        tuning_directory: settings.gemm_tuning_dir.clone(),
        ..CudaOptions::default()
    };
    let backend = match &inputs.files {
        Some(_) => CudaBackend::from_weights(inputs.weights, &inputs.decoder, &options),
        // Random weights are made where they are used.
        None => CudaBackend::random(&inputs.decoder, 0, &options),
    };
    let backend = backend.map_err(|error| by_flag(error, &options))?;
    let device = DeviceFacts {
        name: backend.device_name(),
        dtype: "bfloat16",
        weight_bytes: backend.weight_bytes(),
        limits,
        lora_limits: LoraLimits {
            features: CudaBackend::LORA_FEATURES,
            max_combined_rank: Some(options.max_lora_rank as u32),
            memory: backend.host_memory(),
            ..LoraLimits::new(PackedDtype::Bf16)
        },
    };
    super::start(inputs, Box::new(backend), device)
}

/// Bytes of host memory to keep ready for adapters that are still to be read.
fn host_reserve_bytes(lora: &LoraConfig, decoder: &DecoderConfig, host_bytes: u64) -> usize {
    if let Some(bytes) = lora.host_reserve_bytes {
        return bytes;
    }
    let width = |projection| {
        let (d_in, d_out) = module_shape(decoder, ModuleId::Layer { layer: 0, projection });
        d_in + d_out
    };
    let width: usize = Projection::ALL.into_iter().map(width).sum();
    let adapter_bytes = decoder.num_layers * width * RESERVE_RANK * PackedDtype::Bf16.size_bytes();
    let adapters = lora.max_loaded_loras.map_or(RESERVE_ADAPTERS, |loaded| loaded.min(RESERVE_ADAPTERS));
    let most = usize::try_from(host_bytes / MOST_RESERVE).unwrap_or(usize::MAX);
    (adapters * adapter_bytes).min(most).min(lora.max_loaded_bytes.unwrap_or(usize::MAX))
}

/// The device's refusal in the words of the command line.
fn by_flag(error: LoadError, options: &CudaOptions) -> anyhow::Error {
    let memory = match options.shared_bytes {
        Some(bytes) => format!("--mem-fraction-static {bytes}"),
        None => format!("--mem-fraction-static {}", options.mem_fraction),
    };
    match error {
        LoadError::NoRoom {
            budget_bytes, block_bytes, ..
        } if options.shared_bytes.is_some() => {
            anyhow!("{memory}: {budget_bytes} bytes are for KV cache and adapters, one block of the cache takes {block_bytes}")
        }
        LoadError::NoRoom {
            budget_bytes,
            block_bytes,
            used_bytes,
            total_bytes,
            ..
        } => anyhow!(
            "{memory}: of the device's {total_bytes} bytes weights and buffers (and other processes) have {used_bytes}, so that {budget_bytes} are \
             left for KV cache and adapters; one block of the cache takes {block_bytes}"
        ),
        LoadError::OutOfMemory { what, .. } => {
            let flag = match what {
                MemoryUse::Weights => "--model-path".to_owned(),
                MemoryUse::StepBuffers => format!("--chunked-prefill-size {}", options.max_batch_tokens),
                MemoryUse::CacheAndAdapters => memory,
            };
            anyhow!("{flag}: {error}")
        }
        LoadError::Option { option, expected, got } => {
            let flag = match option {
                "mem_fraction" => "--mem-fraction-static",
                "block_size" => "--block-size",
                "max_batch_tokens" => "--chunked-prefill-size",
                "max_lora_rank" => "--max-lora-rank",
                "max_context" => "--context-length",
                other => other,
            };
            anyhow!("{flag}: expected {expected}, got {got}")
        }
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_refuses_is_said_by_flag_and_budget() {
        let said = |error, options: &CudaOptions| by_flag(error, options).to_string();
        let options = CudaOptions {
            mem_fraction: 0.5,
            max_batch_tokens: 2048,
            ..CudaOptions::default()
        };
        let sized = CudaOptions {
            shared_bytes: Some(77),
            ..options.clone()
        };
        let no_room = || LoadError::NoRoom {
            budget_bytes: 77,
            block_bytes: 4096,
            used_bytes: 600,
            total_bytes: 1000,
            mem_fraction: 0.5,
        };
        let text = said(no_room(), &options);
        for part in ["--mem-fraction-static 0.5: ", "1000", "600", "77 are left", "4096"] {
            assert!(text.contains(part), "{text}");
        }
        let text = said(no_room(), &sized);
        assert!(
            text.starts_with("--mem-fraction-static 77: 77 bytes are") && !text.contains("0.5"),
            "{text}"
        );
        let full = |what| LoadError::OutOfMemory {
            what,
            needed_bytes: 500,
            free_bytes: 400,
            total_bytes: 1000,
        };
        for (what, options, begin) in [
            (MemoryUse::Weights, &options, "--model-path: weights: "),
            (MemoryUse::StepBuffers, &options, "--chunked-prefill-size 2048: buffers of a step: "),
            (
                MemoryUse::CacheAndAdapters,
                &options,
                "--mem-fraction-static 0.5: KV cache and adapters: ",
            ),
            (MemoryUse::CacheAndAdapters, &sized, "--mem-fraction-static 77: KV cache and adapters: "),
        ] {
            let text = said(full(what), options);
            assert_eq!(text, format!("{begin}500 bytes of device memory are needed, 400 of 1000 are free"));
        }
        let option = LoadError::Option {
            option: "block_size",
            expected: "a power of two".to_owned(),
            got: "7".to_owned(),
        };
        assert_eq!(said(option, &options), "--block-size: expected a power of two, got 7");
    }
}
