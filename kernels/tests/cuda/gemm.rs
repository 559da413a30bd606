//! cuBLASLt's GEMMs as the engine calls them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use polylora_kernels::{
    cuda::{
        View,
        activation::Gate,
        gemm::{Gemm, GemmArgs, GemmBias, GemmOutput, Tuned},
        tuning::Tuning,
    },
    reference,
};

use crate::support::{Rng, TOLERANCE, assert_close, gpu, poison_bf16, widen};

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn gemm_overwrites_accumulates_and_adds_bias() {
    let gpu = gpu();
    let mut gemm = Gemm::new(&gpu.device).unwrap();
    let mut rng = Rng(21);
    for (m, n, k) in [(1, 64, 128), (3, 136, 64), (17, 96, 576), (64, 320, 32)] {
        let (x, w, bias) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 0.1), rng.bf16s(n, 1.0));
        let device_bias32 = gpu.stream.upload(&widen(&bias)).unwrap();
        let old = rng.f32s(m * n, 1.0);
        let (device_x, device_w, device_bias) = (
            gpu.stream.upload(&x).unwrap(),
            gpu.stream.upload(&w).unwrap(),
            gpu.stream.upload(&bias).unwrap(),
        );
        for with_bias in [false, true] {
            let expected = reference::gemm(&widen(&x), m, &widen(&w), n, k, with_bias.then(|| widen(&bias)).as_deref());
            let args = |y| GemmArgs {
                x: device_x.view(),
                w: device_w.view(),
                bias: with_bias.then(|| match y {
                    GemmOutput::Bf16(_) => GemmBias::Bf16(device_bias.view()),
                    _ => GemmBias::F32(device_bias32.view()),
                }),
                y,
                m,
                n,
                k,
            };
            let y = gpu.stream.upload(&poison_bf16(m * n)).unwrap();
            gemm.launch(&gpu.stream, &args(GemmOutput::Bf16(y.view()))).unwrap();
            assert_close("bf16", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
            let y = gpu.stream.upload(&vec![f32::NAN; m * n]).unwrap();
            gemm.launch(&gpu.stream, &args(GemmOutput::F32(y.view()))).unwrap();
            assert_close("f32", &gpu.stream.download(y.view()).unwrap(), &expected, 1e-4);
            let y = gpu.stream.upload(&old).unwrap();
            gemm.launch(&gpu.stream, &args(GemmOutput::AddF32(y.view()))).unwrap();
            let sums: Vec<f32> = expected.iter().zip(&old).map(|(a, b)| a + b).collect();
            assert_close("add", &gpu.stream.download(y.view()).unwrap(), &sums, 1e-4);
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn tuned_gemm_is_the_same() {
    let gpu = gpu();
    let mut gemm = Gemm::new(&gpu.device).unwrap();
    let mut rng = Rng(22);
    let (m, n, k) = (8, 256, 128);
    let (x, w) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 0.1));
    let (device_x, device_w) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&w).unwrap());
    let y = gpu.stream.upload(&poison_bf16(m * n)).unwrap();
    let args = GemmArgs {
        x: device_x.view(),
        w: device_w.view(),
        bias: None,
        y: GemmOutput::Bf16(y.view()),
        m,
        n,
        k,
    };
    let tune = |gemm: &mut Gemm| gemm.tune(&gpu.stream, &args, &[device_w.view()], || Ok(())).unwrap();
    assert_eq!(tune(&mut gemm), Tuned { measured: 1, known: 0 });
    let found = gemm.tuning().clone();
    gpu.stream.copy_to_device(y.view(), &poison_bf16(m * n)).unwrap();
    gemm.launch(&gpu.stream, &args).unwrap();
    let expected = reference::gemm(&widen(&x), m, &widen(&w), n, k, None);
    assert_close("tuned", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);

    // The same choice from what was kept, without measuring.
    let mut later = Gemm::new(&gpu.device).unwrap();
    assert_eq!(later.tuned_for(), gemm.tuned_for());
    later.set_tuning(found.clone());
    assert_eq!(tune(&mut later), Tuned { measured: 0, known: 1 });
    assert_eq!(later.chosen(&args), gemm.chosen(&args));
    assert_eq!(later.tuning(), &found);
    gpu.stream.copy_to_device(y.view(), &poison_bf16(m * n)).unwrap();
    later.launch(&gpu.stream, &args).unwrap();
    assert_close("known", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);

    // Choices that cannot be run are measured again.
    let directory = std::env::temp_dir().join(format!("polylora-tuned-{}", std::process::id()));
    found.write(&directory, gemm.tuned_for()).unwrap();
    let file = std::fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, _) = text.split_once("bf16 plain alone ").unwrap();
    for impossible in [
        "stream 99 1 4",
        "stream 0 1 99",
        "wide 99 1 1 4 3",
        "wide 0 1 1 9 99",
        "apart",
        "cublas ffff 1 2 3 4 5 6 7",
    ] {
        std::fs::write(&file, format!("{before}bf16 plain alone {impossible}\nend 1\n")).unwrap();
        later.set_tuning(Tuning::read(&directory, gemm.tuned_for()).unwrap());
        assert_eq!(tune(&mut later), Tuned { measured: 1, known: 0 }, "{impossible}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn own_gemms_agree_for_few_rows() {
    own_gemms_agree(
        23,
        &[(1, 64, 128), (3, 40, 1032), (8, 48, 2048), (11, 16, 96), (16, 24, 1000), (32, 136, 264)],
    );
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn own_gemms_agree_for_more_rows() {
    own_gemms_agree(25, &[(33, 1048, 2056), (48, 136, 72), (64, 4096, 512), (61, 264, 4096)]);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn own_gemms_agree_for_up_to_128_rows() {
    own_gemms_agree(26, &[(65, 136, 1032), (128, 264, 4096)]);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn own_gemms_agree_for_up_to_256_rows() {
    own_gemms_agree(27, &[(129, 1048, 1032), (200, 264, 4096), (256, 472, 2056), (256, 3144, 520)]);
}

fn own_gemms_agree(seed: u64, shapes: &[(usize, usize, usize)]) {
    let gpu = gpu();
    let gemm = Gemm::new(&gpu.device).unwrap();
    let mut rng = Rng(seed);
    for &(m, n, k) in shapes {
        let (x, w, bias) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 0.1), rng.f32s(n, 1.0));
        let (bias16, old): (Vec<_>, Vec<_>) = (bias.iter().map(|value| half::bf16::from_f32(*value)).collect(), rng.f32s(m * n, 1.0));
        let (device_x, device_w) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&w).unwrap());
        let (device_bias, device_bias16) = (gpu.stream.upload(&bias).unwrap(), gpu.stream.upload(&bias16).unwrap());
        for with_bias in [false, true] {
            let expected = reference::gemm(&widen(&x), m, &widen(&w), n, k, with_bias.then_some(&bias[..]));
            let all = GemmArgs {
                x: device_x.view(),
                w: device_w.view(),
                bias: None,
                y: GemmOutput::F32(View::from_address(0, m * n)),
                m,
                n,
                k,
            };
            let candidates = gemm.own_candidates(&all);
            assert!(!candidates.is_empty() || m > 32, "one kernel at least for {m} rows");
            for own in candidates {
                let y = gpu.stream.upload(&poison_bf16(m * n)).unwrap();
                let bias = with_bias.then(|| GemmBias::Bf16(device_bias16.view()));
                let args16 = GemmArgs {
                    y: GemmOutput::Bf16(y.view()),
                    bias,
                    ..all
                };
                gemm.launch_own(&gpu.stream, &args16, own).unwrap();
                let what = format!("{m} {n} {k} {own:?}");
                assert_close(&what, &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
                let y = gpu.stream.upload(&vec![f32::NAN; m * n]).unwrap();
                let bias = with_bias.then(|| GemmBias::F32(device_bias.view()));
                let args32 = GemmArgs {
                    y: GemmOutput::F32(y.view()),
                    bias,
                    ..all
                };
                gemm.launch_own(&gpu.stream, &args32, own).unwrap();
                assert_close(&what, &gpu.stream.download(y.view()).unwrap(), &expected, 1e-4);
                let y = gpu.stream.upload(&old).unwrap();
                let add = GemmArgs {
                    y: GemmOutput::AddF32(y.view()),
                    bias,
                    ..all
                };
                gemm.launch_own(&gpu.stream, &add, own).unwrap();
                let sums: Vec<f32> = expected.iter().zip(&old).map(|(a, b)| a + b).collect();
                assert_close(&what, &gpu.stream.download(y.view()).unwrap(), &sums, 1e-4);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn a_gated_gemm_is_a_gemm_and_its_activation() {
    let gpu = gpu();
    let mut gemm = Gemm::new(&gpu.device).unwrap();
    let mut rng = Rng(24);
    for (m, ffn, k) in [(65, 8, 72), (128, 120, 1032), (129, 1048, 520), (256, 112, 2048), (200, 232, 256)] {
        let (x, w) = (rng.bf16s(m * k, 1.0), rng.bf16s(2 * ffn * k, 0.1));
        let (device_x, device_w) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&w).unwrap());
        let sums = reference::gemm(&widen(&x), m, &widen(&w), 2 * ffn, k, None);
        let rounded = |sum: &f32| half::bf16::from_f32(*sum).to_f32();
        let gate_up: Vec<f32> = sums.iter().map(rounded).collect();
        for gate in [Gate::Silu, Gate::GeluTanh] {
            let expected = match gate {
                Gate::Silu => reference::silu_mul(&gate_up, ffn),
                Gate::GeluTanh => reference::gelu_tanh_mul(&gate_up, ffn),
            };
            let y = gpu.stream.upload(&poison_bf16(m * ffn)).unwrap();
            let args = GemmArgs {
                x: device_x.view(),
                w: device_w.view(),
                bias: None,
                y: GemmOutput::Gated(y.view(), gate),
                m,
                n: 2 * ffn,
                k,
            };
            let is_first = gate == Gate::Silu;
            assert!(!is_first || !gemm.launch_gated(&gpu.stream, &args).unwrap(), "nothing has been measured");
            for own in gemm.own_candidates(&args) {
                gpu.stream.copy_to_device(y.view(), &poison_bf16(m * ffn)).unwrap();
                gemm.launch_own(&gpu.stream, &args, own).unwrap();
                let what = format!("{m} {ffn} {k} {own:?}");
                assert_close(&what, &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
            }
            let apart = gpu.stream.upload(&poison_bf16(m * 2 * ffn)).unwrap();
            let is_own = !gemm.own_candidates(&args).is_empty();
            assert_eq!(is_own, gpu.device.info().compute_capability == (9, 0));
            let tuned = gemm.tune_gated(
                &gpu.stream,
                &args,
                &[device_w.view()],
                || Ok(()),
                |gemm, w| {
                    let apart_args = GemmArgs {
                        w,
                        y: GemmOutput::Bf16(apart.view()),
                        ..args
                    };
                    gemm.launch(&gpu.stream, &apart_args)?;
                    gpu.kernels.activation.launch(&gpu.stream, gate, apart.view(), y.view(), m, ffn)
                },
            );
            let first = usize::from(is_first);
            assert_eq!(
                tuned.unwrap(),
                match is_own {
                    true => Tuned {
                        measured: first,
                        known: 1 - first
                    },
                    false => Tuned::default(),
                }
            );
            gpu.stream.copy_to_device(y.view(), &poison_bf16(m * ffn)).unwrap();
            if gemm.launch_gated(&gpu.stream, &args).unwrap() {
                assert_close("tuned", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn wrong_lengths_are_refused() {
    let gpu = gpu();
    let mut gemm = Gemm::new(&gpu.device).unwrap();
    let x = gpu.stream.upload(&poison_bf16(64)).unwrap();
    let args = GemmArgs {
        x: x.view(),
        w: x.view(),
        bias: None,
        y: GemmOutput::Bf16(x.view()),
        m: 8,
        n: 8,
        k: 16,
    };
    let error = gemm.launch(&gpu.stream, &args).unwrap_err().to_string();
    assert_eq!(error, "gemm: x has 64 elements, 128 are needed");
}

/// cuBLASLt waits for the whole context when it is closed, which nobody may while another thread captures: the driver crashes.
#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn captures_are_not_lost_to_gemms_that_are_dropped() {
    const CAPTURES: usize = 3000;
    let gpu = gpu();
    let bytes = gpu.stream.upload(&[1u8; 256]).unwrap();
    let ended = AtomicBool::new(false);
    let (mut begun, mut captured) = (0, 0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                gpu.device.bind().unwrap();
                while !ended.load(Relaxed) {
                    drop(Gemm::new(&gpu.device).unwrap());
                }
            });
        }
        for _ in 0..CAPTURES {
            let graph = gpu.stream.capture(|| {
                begun += 1;
                (0..20).try_for_each(|_| gpu.stream.fill_bytes(bytes.view(), 0))
            });
            captured += usize::from(graph.is_ok_and(|graph| gpu.stream.launch_graph(&graph).is_ok()));
        }
        ended.store(true, Relaxed);
    });
    assert_eq!((begun, captured), (CAPTURES, CAPTURES), "each at the first try");
    assert!(gpu.stream.download(bytes.view()).unwrap().iter().all(|&byte| byte == 0));
}
