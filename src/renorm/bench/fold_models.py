"""The networks of suite `fold`: the smallest with batch norm of each of timm's families, found by their names."""

from __future__ import annotations

__all__ = ["NAMED", "OTHERS", "SIDES"]

# The families for which a target is set.
NAMED = """
resnet50 efficientnet_b0 mobilenetv3_large_100 mobilevit_xxs levit_128s densenet121 regnetx_002 regnety_002
hrnet_w18_small inception_v3 dla34 ghostnet_100 rexnet_100 darknet17 repvgg_a0 legacy_xception
""".split()

# In the order of the alphabet, the largest last.
OTHERS = """
bat_resnext26ts botnet26t_256 coatnet_nano_cc_224 convmixer_768_32 cpubone_nano cs3darknet_focus_s
cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknetaa53 densenetblur121d dla46x_c dpn48b
eca_botnext26ts_256 eca_resnext26ts eca_vovnet39b ecaresnet26t ecaresnetlight ecaresnext26t_32x4d
efficientformer_l1 efficientformerv2_s0 efficientnetv2_s efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_mci0 fbnetc_100 fbnetv3_b gc_efficientnetv2_rw_t gcresnet33ts
gcresnext26ts gernet_s ghostnet_050 ghostnetv3_050 halo2botnet50ts_256 halonet_h1 haloregnetz_b hardcorenas_b
hgnet_tiny hgnetv2_b0 iformer_s inception_next_atto inception_resnet_v2 inception_v4 lambda_resnet26t
lamhalobotnet50ts_256 lcnet_035 lcnetv2_small legacy_seresnet18 lowformer_b0 maxvit_pico_rw_256 mixnet_s
mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035 mobilenetv3_small_050 mobileone_s1 mobilevitv2_050
nextvit_small regnetv_040 regnetz_005 regnetz_b16 repghostnet_050 repvit_m1 res2net50_14w_8s resnest14d
resnet10t resnet32ts resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts resnext50_32x4d rexnetr_100
sebotnet33ts_256 sedarknet21 sehalonet33ts selecsls42 semnasnet_050 seresnet18 seresnet33ts seresnetaa50d
seresnext26t_32x4d seresnext26ts shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050
swiftformer_xs tf_efficientnet_b0 tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e tresnet_m visformer_tiny
vit_small_resnet50d_s16_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41p xcit_nano_12_p8_224
seresnextaa101d_32x8d vgg11_bn senet154 pnasnet5large nasnetalarge
""".split()

# These take no other size than their own, or fall to nothing below it.
AT_224 = """
coatnet_nano_cc_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 haloregnetz_b levit_128s
swiftformer_xs visformer_tiny vit_small_resnet50d_s16_224 volo_d1_224 xcit_nano_12_p8_224
""".split()
AT_256 = """
bat_resnext26ts botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 halonet_h1 lamhalobotnet50ts_256
maxvit_pico_rw_256 sebotnet33ts_256 sehalonet33ts
""".split()

SIDES = {
    **dict.fromkeys((*NAMED, *OTHERS), 96),  # pixels
    **dict.fromkeys(AT_224, 224),
    **dict.fromkeys(AT_256, 256),
}
